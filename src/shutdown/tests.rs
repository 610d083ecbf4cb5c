use proptest::prelude::*;

use super::*;

const LIMIT: Duration = Duration::from_secs(10);

fn at(begin: Instant, ms: u64) -> Instant {
    begin + Duration::from_millis(ms)
}

#[test]
fn the_steps_come_in_order_and_tell_how_long_they_took() {
    let begin = Instant::now();
    let mut machine = Machine::new(LIMIT);
    assert_eq!((machine.step(), machine.view(begin), machine.deadline()), (Step::Running, None, None));
    assert_eq!(machine.next(None, begin), None, "nothing has begun");
    assert_eq!(machine.ask(Asked::BySignal, "SIGTERM", begin), Demand::Begin);
    machine.next(None, at(begin, 1));
    machine.next(Some("one reader took nothing".to_owned()), at(begin, 5000));
    assert_eq!(machine.step(), Step::Saving);
    let view = machine.view(at(begin, 5010)).unwrap();
    assert_eq!((view.reason.as_str(), view.elapsed_ms, view.limit_ms), ("SIGTERM", 5010, 10_000));
    let steps: Vec<_> = view.steps.iter().map(|s| (s.step, s.started_ms, s.took_ms, s.trouble.is_some())).collect();
    let expected = [
        (Step::Refusing, 0, Some(1), false),
        (Step::Finishing, 1, Some(4999), true),
        (Step::Saving, 5000, None, false),
    ];
    assert_eq!(steps, expected);
    for step in [Step::HandingOver, Step::Hooks, Step::Done] {
        machine.next(None, at(begin, 6000));
        assert_eq!(machine.step(), step);
    }
    assert_eq!(machine.next(None, at(begin, 7000)), None, "it is done once");
    let shown = serde_json::to_value(machine.view(at(begin, 7000))).unwrap();
    assert_eq!(shown["steps"][4]["step"], "hooks");
    assert_eq!(serde_json::from_value::<View>(shown).ok(), machine.view(at(begin, 7000)));
}

#[test]
fn a_second_signal_is_a_hard_stop_and_a_signal_behind_a_request_is_the_first() {
    let now = Instant::now();
    let mut machine = Machine::new(LIMIT);
    assert_eq!(machine.ask(Asked::ByRequest, "POST /v1/drain", now), Demand::Begin);
    assert_eq!(machine.ask(Asked::ByRequest, "POST /v1/drain", now), Demand::Nothing);
    assert_eq!(machine.ask(Asked::BySignal, "SIGTERM", now), Demand::Nothing);
    assert_eq!(machine.ask(Asked::ByRequest, "POST /v1/drain", now), Demand::Nothing);
    assert_eq!(machine.ask(Asked::BySignal, "SIGTERM", now), Demand::HardStop);
    assert_eq!(machine.view(now).unwrap().reason, "POST /v1/drain");
}

#[test]
fn what_is_stuck_leaves_time_for_the_later_steps() {
    let begin = Instant::now();
    let mut machine = Machine::new(LIMIT);
    machine.ask(Asked::BySignal, "SIGTERM", begin);
    let limits: Vec<_> = Step::ALL.iter().filter_map(|step| machine.limit_of(*step)).collect();
    assert!(limits.is_sorted() && limits.last() < machine.deadline().as_ref());
    // A hook that is stuck there ends with the process.
    assert_eq!((limits.len(), machine.limit_of(Step::Hooks)), (4, None));
    assert_eq!(machine.limit_of(Step::Finishing), Some(begin + LIMIT / 2));
    assert_eq!(machine.deadline(), Some(begin + LIMIT));
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Ask(Asked),
    Next,
}

proptest! {
    /// However requests, signals and ends of steps are mixed: the steps come in order, each once, and only a second signal is a
    /// hard stop.
    #[test]
    fn any_history(events in proptest::collection::vec(prop_oneof![
        Just(Event::Ask(Asked::BySignal)), Just(Event::Ask(Asked::ByRequest)), Just(Event::Next), Just(Event::Next)
    ], 0..40)) {
        let begin = Instant::now();
        let mut machine = Machine::new(LIMIT);
        let (mut signals, mut begun, mut deadline) = (0, false, None);
        for (i, event) in events.into_iter().enumerate() {
            let (now, before) = (at(begin, i as u64), machine.step());
            match event {
                Event::Ask(asked) => {
                    signals += i32::from(asked == Asked::BySignal);
                    let demand = machine.ask(asked, "x", now);
                    prop_assert_eq!(demand == Demand::Begin, !begun);
                    prop_assert_eq!(demand == Demand::HardStop, begun && asked == Asked::BySignal && signals > 1);
                    begun = true;
                }
                Event::Next => {
                    let ended = machine.next(None, now);
                    prop_assert_eq!(ended.map(|ended| ended.step), (begun && before != Step::Done).then_some(before));
                }
            }
            let index = |step: Step| Step::ALL.iter().position(|s| *s == step).unwrap();
            prop_assert!((0..=1).contains(&(index(machine.step()) - index(before))));
            prop_assert_eq!(machine.step() > Step::Running, begun);
            // The deadline doesn't move.
            prop_assert!(deadline.is_none() || deadline == machine.deadline());
            deadline = machine.deadline();
            if let Some(view) = machine.view(now) {
                let steps: Vec<_> = view.steps.iter().map(|s| s.step).collect();
                prop_assert_eq!(&steps[..], &Step::ALL[1..=index(machine.step())]);
            }
        }
    }
}

#[tokio::test]
async fn parts_of_a_daemon_hear_of_each_step() {
    let shutdown = Shutdown::new(Duration::from_millis(100));
    let cancelled = |shutdown: &Shutdown| {
        [shutdown.refusing(), shutdown.finishing(), shutdown.saving(), shutdown.done()].map(|t| t.is_cancelled())
    };
    assert!(!shutdown.has_begun() && cancelled(&shutdown) == [false; 4]);
    shutdown.ask(Asked::BySignal, "SIGTERM");
    assert_eq!(cancelled(&shutdown), [true, false, false, false]);
    assert_eq!(shutdown.next(None), Step::Finishing);
    assert_eq!(cancelled(&shutdown), [true, true, false, false]);
    shutdown.perform(async { None }).await;
    assert_eq!(cancelled(&shutdown), [true, true, true, false]);
    // What never ends is given up, and said.
    shutdown.perform(std::future::pending()).await;
    assert_eq!(shutdown.step(), Step::HandingOver);
    assert!(shutdown.view().unwrap().steps[2].trouble.is_some());
    while shutdown.step() != Step::Done {
        shutdown.next(None);
    }
    assert_eq!(cancelled(&shutdown), [true; 4]);
}

/// `safekeeperctl drain` asked a moment too late, and called a clean stop a broken one.
#[tokio::test]
async fn the_end_waits_for_whoever_follows_to_ask_once_more() {
    // What is ready at once is found to be so.
    let may_end = async |shutdown: &Shutdown| tokio::time::timeout(Duration::ZERO, shutdown.last_word()).await.is_ok();
    let shutdown = Shutdown::new(LIMIT);
    shutdown.finish();
    assert!(may_end(&shutdown).await, "nobody follows");
    shutdown.follow();
    assert!(!may_end(&shutdown).await);
    shutdown.tell_last();
    assert!(may_end(&shutdown).await);
    // Who is gone isn't waited for without end.
    shutdown.follow();
    shutdown.last_word().await;
}
