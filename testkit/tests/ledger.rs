//! The ledger finds what is lost, and only that.

use testkit::{Ledger, Postgres, scenario, secs};

#[test]
fn acknowledged_rows_survive_crashes_and_a_lost_one_is_found() {
    scenario("kit-ledger", |scratch| {
        let mut server = Postgres::init(scratch, "server", &[])?;
        server.start()?;
        let ledger = Ledger::start(&server, 3)?;
        for _ in 0..3 {
            ledger.wait_progress(secs(60), 30)?;
            server.kill9()?;
            server.start()?;
        }
        ledger.wait_progress(secs(60), 30)?;
        let acknowledged = ledger.finish(secs(60))?;
        let rows = Ledger::verify(&acknowledged, &server)?;
        // A crash may leave at most one commit of each writer behind that nobody was told about.
        assert!((acknowledged.len()..=acknowledged.len() + 3 * 3).contains(&rows), "{rows} of {}", acknowledged.len());
        let lost = acknowledged.last().expect("commits").id;
        server.sql()?.run(&format!("DELETE FROM ledger WHERE id = {lost}"))?;
        let error = Ledger::verify(&acknowledged, &server).expect_err("a row is gone").to_string();
        assert!(error.contains(&lost.to_string()), "{error}");
        Ok(())
    });
}
