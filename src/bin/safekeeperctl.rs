//! `safekeeperctl`: what an operator does across nodes and servers, as commands.

use std::process::ExitCode;

use safekeeper::config::safekeeperctl::{
    CtlCommand, DrainArgs, FailoverCommand, ForksArgs, ForksCommand, ForksExportArgs, PrepareArgs,
    SafekeeperctlSettings, TimelineCommand,
};
use safekeeper::config::{self, Loaded, LogFormat};
use safekeeper::operate::steps::{Event, What};
use safekeeper::operate::{Kind, Steps, drain, failover, forks};
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
        CtlCommand::Failover(FailoverCommand::Prepare(args)) => prepare(&settings, args, &steps).await,
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
        repoint: args.repoint,
        timeout: settings.timeout.into(),
    };
    match failover::prepare(&options, steps).await {
        Ok(prepared) => Report::done(&prepared, "promote the standby now"),
        Err(error) => Report::failed(error.kind(), &error),
    }
}

async fn drained(settings: &SafekeeperctlSettings, args: DrainArgs, steps: &Steps) -> Report {
    let options = drain::DrainOptions { node: args.node, timeout: settings.timeout.into() };
    match drain::run(&options, steps).await {
        Ok(drained) => Report::done(&drained, format!("{} is out of service, its process is gone", drained.node)),
        Err(error) => Report::failed(error.kind(), &error),
    }
}

async fn list_forks(settings: &SafekeeperctlSettings, args: ForksArgs) -> Report {
    let options = forks::ForksOptions { node: args.node, ttid: settings.ttid() };
    match forks::list(&options).await {
        Ok(list) => Report::done(&list, String::new()),
        Err(error) => Report::failed(error.kind(), &error),
    }
}

async fn export_forks(settings: &SafekeeperctlSettings, args: ForksExportArgs, steps: &Steps) -> Report {
    let options = forks::ForksOptions { node: args.from.node, ttid: settings.ttid() };
    match forks::export(&options, args.name.as_deref(), &args.output, steps).await {
        Ok(exported) => Report::done(&exported, format!("{} files written", exported.files.len())),
        Err(error) => Report::failed(error.kind(), &error),
    }
}
