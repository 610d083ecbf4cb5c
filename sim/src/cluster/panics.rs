//! A panic in a task ends only that task; a history in which one happened has failed nevertheless.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// The first panic of this thread since it was last asked.
    static FIRST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work`, all of whose tasks stay on this thread. Besides its result, if it has one: the first panic, in whatever task.
pub fn watch<T>(work: impl FnOnce() -> T) -> (Option<T>, Option<String>) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            FIRST.with_borrow_mut(|first| {
                first.get_or_insert_with(|| panic.to_string());
            });
            usual(panic);
        }));
    });
    FIRST.take();
    let result = panic::catch_unwind(AssertUnwindSafe(work)).ok();
    (result, FIRST.take())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_panic_in_a_task_is_noticed() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let work = || {
            runtime.block_on(async {
                let task = tokio::spawn(async { panic!("an assertion of a test that panics on purpose") });
                assert!(task.await.is_err());
                7
            })
        };
        let (result, panic) = super::watch(work);
        assert_eq!(result, Some(7));
        assert!(panic.is_some_and(|text| text.contains("on purpose")));
    }
}
