//! A real Prometheus that scrapes the daemons under test.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::http::http_get;
use crate::port::Port;
use crate::process::{Daemon, Launch};
use crate::scratch::Scratch;
use crate::secs;

/// A running Prometheus, scraping every second.
#[derive(Debug)]
pub struct Prometheus {
    port: Port,
    daemon: Daemon,
}

impl Prometheus {
    /// Are `prometheus` and `promtool` installed?
    #[must_use]
    pub fn is_installed() -> bool {
        ["prometheus", "promtool"].iter().all(|program| {
            let version = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            version.is_ok_and(|status| status.success())
        })
    }

    /// Starts it. `jobs` are pairs of a job name and the addresses it scrapes.
    ///
    /// # Errors
    /// When it doesn't get ready.
    pub fn start(scratch: &Scratch, jobs: &[(&str, Vec<String>)]) -> Result<Prometheus> {
        let port = Port::reserve()?;
        let dir = scratch.path().join("prometheus");
        fs::create_dir(&dir)?;
        let mut config = String::from("global: {scrape_interval: 1s, evaluation_interval: 1s}\nscrape_configs:\n");
        for (job, targets) in jobs {
            let targets = serde_json::to_string(targets)?;
            writeln!(config, "- {{job_name: {job}, static_configs: [{{targets: {targets}}}]}}")?;
        }
        let config_path = dir.join("prometheus.yml");
        fs::write(&config_path, config)?;
        let launch = Launch::new("prometheus")
            .arg(format!("--config.file={}", config_path.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address={}", port.address()))
            .arg("--log.level=warn");
        let daemon = Daemon::spawn(scratch, "prometheus", launch)?;
        let mut prometheus = Prometheus { port, daemon };
        let address = prometheus.port.address();
        prometheus.daemon.wait_until(secs(60), "prometheus to be ready", || http_get(&address, "/-/ready")?.ok())?;
        Ok(prometheus)
    }

    /// The result of an instant query: one value per series.
    ///
    /// # Errors
    /// What Prometheus finds wrong with the query.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let path = format!("/api/v1/query?query={}", percent_encode(expression));
        let response = http_get(&self.port.address(), &path)?;
        let answer: Value = serde_json::from_str(&response.body).with_context(|| response.body.clone())?;
        ensure!(answer.get("status").and_then(Value::as_str) == Some("success"), "{answer}");
        let result = answer.pointer("/data/result").and_then(Value::as_array);
        Ok(result.with_context(|| format!("no result in {answer}"))?.clone())
    }
}

/// Runs `promtool` with `args` and `input`.
///
/// # Errors
/// What it complains about.
pub fn promtool(args: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new("promtool")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start promtool")?;
    child.stdin.take().context("promtool's input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
    ensure!(output.status.success(), "promtool {}: {said}", args.join(" "));
    Ok(())
}

fn percent_encode(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}
