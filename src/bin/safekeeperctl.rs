//! `safekeeperctl`: what an operator does across nodes and servers, as commands.

use std::process::ExitCode;

use safekeeper::config::safekeeperctl::{
    CtlCommand, DrainArgs, FailoverCommand, ForksArgs, ForksCommand, ForksExportArgs, PrepareArgs,
    SafekeeperctlSettings, SwitchoverArgs, TimelineCommand,
};
use safekeeper::config::{self, Loaded, LogFormat};
use safekeeper::operate::steps::{Event, What};
use safekeeper::operate::{Kind, Steps, drain, failover, forks, status, switchover};
use serde::Serialize;

fn main() -> ExitCode {
    let Loaded::<SafekeeperctlSettings> { settings, .. } =
        config::load(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match start(settings) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn start(settings: SafekeeperctlSettings) -> anyhow::Result<ExitCode> {
    // The steps say what an operator wants to know; the log is for those who look for a bug.
    if std::env::var_os("RUST_LOG").is_some_and(|filter| !filter.is_empty()) {
        config::init_logging(LogFormat::Plain)?;
    }
    let json = settings.json;
    let steps = Steps::new(move |event| tell(event, json));
    let report = match settings.command.clone() {
        CtlCommand::Failover(FailoverCommand::Prepare(args)) => prepare(&settings, *args, &steps).await,
        CtlCommand::Failover(FailoverCommand::Cancel(_)) => cancel(&settings, &steps).await,
        CtlCommand::Switchover(args) => switch_over(&settings, *args, &steps).await,
        CtlCommand::Status => members(&settings).await,
        CtlCommand::Drain(args) => drained(&settings, args, &steps).await,
        CtlCommand::Timeline(TimelineCommand::Forks(ForksCommand::List(args))) => list_forks(&settings, args).await,
        CtlCommand::Timeline(TimelineCommand::Forks(ForksCommand::Export(args))) => {
            export_forks(&settings, args, &steps).await
        }
    };
    report.print(json, &steps)
}

/// One line for each event, with the time since the begin.
fn tell(event: &Event, json: bool) {
    let at = event.at.as_secs_f64();
    let line = match &event.what {
        What::Began(text) => format!("{at:8.3}s  {}: {text}", event.step),
        What::Note(text) => format!("{at:8.3}s  {}: {text}", event.step),
        What::Done(text, took) => format!("{at:8.3}s  {}: {text} [{:.3} s]", event.step, took.as_secs_f64()),
    };
    if json { eprintln!("{line}") } else { println!("{line}") }
}

/// What a command came to.
struct Report {
    result: Result<serde_json::Value, (Kind, String)>,
    /// For people.
    text: String,
}

impl Report {
    fn done(value: &impl Serialize, text: impl Into<String>) -> Self {
        let result = serde_json::to_value(value).map_err(|error| (Kind::Failed, error.to_string()));
        Self { result, text: text.into() }
    }

    fn failed(kind: Kind, error: &dyn std::error::Error) -> Self {
        Self { result: Err((kind, error.to_string())), text: String::new() }
    }

    fn print(self, json: bool, steps: &Steps) -> anyhow::Result<ExitCode> {
        let code = self.result.as_ref().map_or_else(|(kind, _)| kind.exit_code(), |_| 0);
        if json {
            let (ok, steps) = (self.result.is_ok(), steps.reports());
            let object = match self.result {
                Ok(result) => serde_json::json!({ "ok": ok, "result": result, "steps": steps }),
                Err((kind, error)) => {
                    serde_json::json!({ "ok": ok, "kind": kind, "error": error, "steps": steps })
                }
            };
            println!("{}", serde_json::to_string(&object)?);
        } else {
            match self.result {
                Ok(_) => println!("{}", self.text),
                Err((_, error)) => eprintln!("error: {error}"),
            }
        }
        Ok(ExitCode::from(code))
    }
}

async fn prepare(settings: &SafekeeperctlSettings, args: PrepareArgs, steps: &Steps) -> Report {
    let options = failover::PrepareOptions {
        safekeepers: settings.safekeepers.clone(),
        ttid: settings.ttid(),
        standby: args.standby,
        pg_timeline: args.pg_timeline,
        repoint: args.repoint,
        timeout: settings.timeout.into(),
    };
    match failover::prepare(&options, steps).await {
        Ok(prepared) => Report::done(&prepared, promote_now(&prepared)),
        Err(error) => Report::failed(error.kind(), &error),
    }
}

fn promote_now(prepared: &failover::Prepared) -> String {
    let failover::Prepared { lsn, pg_timeline, fenced, .. } = prepared;
    let holds = format!("Every acknowledged commit is below {lsn} on Postgres timeline {pg_timeline}.");
    let fence = format!("No primary on timeline {fenced} gets acknowledgements any more.");
    let promote = match &prepared.standby {
        Some(standby) => format!("{standby} has all of it: promote it now."),
        None => format!("Promote only a standby that has replayed up to {lsn}."),
    };
    format!("{holds} {fence}\n{promote}")
}

async fn cancel(settings: &SafekeeperctlSettings, steps: &Steps) -> Report {
    let options = failover::CancelOptions {
        safekeepers: settings.safekeepers.clone(),
        ttid: settings.ttid(),
        timeout: settings.timeout.into(),
    };
    match failover::cancel(&options, steps).await {
        Ok(cancelled) if cancelled.missing.is_empty() => Report::done(&cancelled, "The old primary may go on."),
        Ok(cancelled) => {
            let missing: Vec<_> = cancelled.missing.iter().map(ToString::to_string).collect();
            let text = format!(
                "The old primary may go on, without {}: not reached. Run this again once they are back.",
                missing.join(", ")
            );
            Report::done(&cancelled, text)
        }
        Err(error) => Report::failed(error.kind(), &error),
    }
}

async fn switch_over(settings: &SafekeeperctlSettings, args: SwitchoverArgs, steps: &Steps) -> Report {
    let options = switchover::SwitchoverOptions {
        safekeepers: settings.safekeepers.clone(),
        ttid: settings.ttid(),
        from: args.from,
        to: args.to,
        application_name: args.application_name,
        stop: args.stop,
        start_old: args.start_old,
        timeout: settings.timeout.into(),
    };
    match switchover::run(&options, steps).await {
        Ok(done) => {
            let mut text = format!("Postgres timeline {} is in use.", done.pg_timeline);
            if let Some(pause) = done.pause_seconds {
                text += &format!(" Commits paused for {pause:.3} s.");
            }
            done.to_do.iter().for_each(|to_do| text += &format!("\n{to_do}."));
            Report::done(&done, text)
        }
        Err(error) => Report::failed(error.kind(), &error),
    }
}

async fn members(settings: &SafekeeperctlSettings) -> Report {
    match status::run(&status::StatusOptions { nodes: settings.nodes.clone(), ttid: settings.ttid() }).await {
        Ok(members) => Report::done(&members, members.table()),
        Err(error) => Report::failed(error.kind(), &error),
    }
}

async fn drained(settings: &SafekeeperctlSettings, args: DrainArgs, steps: &Steps) -> Report {
    let options = drain::DrainOptions { node: args.node, timeout: settings.timeout.into() };
    match drain::run(&options, steps).await {
        Ok(drained) => {
            let mut text = format!("{} is out of service, its process is gone", drained.node);
            drained.troubles().for_each(|(step, trouble)| text += &format!("\nNot done in {}: {trouble}", step.name()));
            Report::done(&drained, text)
        }
        Err(error) => Report::failed(error.kind(), &error),
    }
}

fn forks_options(settings: &SafekeeperctlSettings, args: ForksArgs) -> forks::ForksOptions {
    let place = match args.datadir {
        Some(datadir) => forks::ForksPlace::Stopped { datadir, journal_dir: args.journal_dir },
        None => forks::ForksPlace::Node(args.node),
    };
    forks::ForksOptions { place, ttid: settings.ttid() }
}

async fn list_forks(settings: &SafekeeperctlSettings, args: ForksArgs) -> Report {
    match forks::list(&forks_options(settings, args)).await {
        Ok(list) => Report::done(&list, list.to_string()),
        Err(error) => Report::failed(error.kind(), &error),
    }
}

async fn export_forks(settings: &SafekeeperctlSettings, args: ForksExportArgs, steps: &Steps) -> Report {
    match forks::export(&forks_options(settings, args.from), args.name.as_deref(), &args.output, steps).await {
        Ok(exported) => Report::done(&exported, exported.to_string()),
        Err(error) => Report::failed(error.kind(), &error),
    }
}
