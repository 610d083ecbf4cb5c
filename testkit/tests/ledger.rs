//! The ledger finds what is lost, and only that.

use anyhow::ensure;
use testkit::{Ledger, Postgres, StopMode, scenario, secs, wait_for};

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

#[test]
fn the_ledger_finds_what_came_back_and_what_a_fenced_server_acknowledged() {
    scenario("kit-ledger-check", |scratch| {
        let mut server = Postgres::init(scratch, "server", &[])?;
        server.start()?;
        let ledger = Ledger::start(&server, 2)?;
        // Every kind of transaction, several times.
        ledger.wait_progress(secs(60), 100)?;
        let tally = ledger.check(&server)?;
        assert!(tally.acknowledged >= 100 && tally.rolled_back > 0, "{tally:?}");
        ledger.fence(&server);
        ledger.wait_progress(secs(60), 4)?;
        let error = ledger.check(&server).expect_err("it acknowledges").to_string();
        assert!(error.contains("a fenced server has ACKNOWLEDGED"), "{error}");
        ledger.unfence(&server);
        ledger.stop(secs(60))?;
        ledger.check(&server)?;

        // A transaction that failed on purpose comes back: ids of a writer have no gaps but these.
        let gap = "SELECT min(id) + 1 FROM ledger l WHERE NOT EXISTS (SELECT FROM ledger n WHERE n.id = l.id + 1)";
        let id = server.sql()?.value(gap)?;
        server.sql()?.run(&format!("INSERT INTO ledger VALUES ({id}, '')"))?;
        let error = ledger.check(&server).expect_err("a row came back").to_string();
        assert!(error.contains("ROLLED BACK"), "{error}");
        server.sql()?.run(&format!("DELETE FROM ledger WHERE id = {id}"))?;
        ledger.check(&server)?;

        // Nobody was told of it, but it was read.
        server.sql()?.run("INSERT INTO ledger VALUES (1, '')")?;
        ledger.witness(&server)?;
        server.sql()?.run("DELETE FROM ledger WHERE id = 1")?;
        let error = ledger.check(&server).expect_err("a row that was seen is gone").to_string();
        assert!(error.contains("a standby showed"), "{error}");
        Ok(())
    });
}

#[test]
fn the_ledger_tells_of_errors_that_writers_met() {
    scenario("kit-ledger-errors", |scratch| {
        let mut server = Postgres::init(scratch, "server", &[])?;
        server.start()?;
        let ledger = Ledger::start(&server, 2)?;
        let begun = std::time::Instant::now();
        // Every kind of transaction, those that fail on purpose among them.
        ledger.wait_progress(secs(60), 100)?;
        ledger.check_undisturbed(&server, begun)?;
        server.kill9()?;
        server.start()?;
        ledger.wait_progress(secs(60), 20)?;
        let error = ledger.check_undisturbed(&server, begun).expect_err("it was killed").to_string();
        assert!(error.contains("writers met ERRORS"), "{error}");
        ledger.check_undisturbed(&server, std::time::Instant::now())
    });
}

#[test]
fn a_former_primary_follows_again_by_rewind_and_by_a_new_copy() {
    scenario("kit-rejoin", |scratch| {
        let settings = [("wal_keep_size", "'1GB'"), ("wal_log_hints", "on")];
        let mut a = Postgres::init(scratch, "a", &settings)?;
        a.start()?;
        let mut b = Postgres::standby_of(scratch, "b", &a, &a.conninfo())?;
        b.start()?;
        let ledger = Ledger::start(&a, 2)?;
        ledger.attach(&b, 2);
        for round in 0..2 {
            ledger.wait_progress(secs(60), 50)?;
            ledger.witness(&b)?;
            a.stop(StopMode::Fast)?;
            b.promote()?;
            ledger.wait_progress(secs(60), 50)?;
            // What it writes alone is undone.
            a.start()?;
            a.sql()?.run("CREATE TABLE alone (id int)")?;
            a.kill9()?;
            if round == 0 {
                a.rewind(scratch, &b, &b.conninfo())?
            } else {
                a.rebuild(scratch, &b, &b.conninfo())?
            }
            a.start()?;
            let end = b.flush_lsn()?;
            wait_for(secs(60), "the former primary", || {
                let at = a.replay_lsn()?;
                ensure!(at >= end, "at {at}, not {end}");
                Ok(())
            })?;
            assert_eq!(a.sql()?.value("SELECT count(*) FROM pg_class WHERE relname = 'alone'")?, "0");
            std::mem::swap(&mut a, &mut b);
        }
        Ok(())
    });
}
