//! What the daemons tell Prometheus: `/metrics` is well-formed, and every query of the dashboard finds data in a real
//! Prometheus that scrapes the running daemons.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Prometheus, Scratch, Sql, http_get, in_ci, promtool, scenario, secs, wait_for,
};

/// Queries that are rightly empty on a healthy cluster, each with the reason. They must still be valid.
const MAY_BE_EMPTY: &[(&str, &str)] = &[];

fn start(scratch: &Scratch) -> Result<Cluster> {
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    Cluster::start(scratch, &binaries, &ClusterOptions::default())
}

/// True when Prometheus is there. Without it the test says what it leaves out, but not in continuous integration.
fn have_prometheus(left_out: &str) -> bool {
    let have = Prometheus::is_installed();
    assert!(have || !in_ci(), "prometheus and promtool are not installed");
    if !have {
        println!("LEFT OUT, no prometheus and promtool installed: {left_out}");
    }
    have
}

#[test]
fn metrics_are_well_formed() {
    if !have_prometheus("check of the format of /metrics") {
        return;
    }
    scenario("metrics", |scratch| {
        let cluster = start(scratch)?;
        cluster.primary.pgbench_init(scratch, 1)?;
        let mut addresses: Vec<String> = cluster.safekeepers.iter().map(|sk| sk.http_address()).collect();
        addresses.push(cluster.walproposer.http_address());
        for address in addresses {
            let response = http_get(&address, "/metrics")?;
            ensure!(response.head.to_lowercase().contains("content-type: text/plain"), "{}", response.head);
            promtool(&["check", "metrics"], &response.ok()?)?;
        }
        Ok(())
    });
}

#[test]
fn every_query_of_the_dashboard_finds_data() {
    if !have_prometheus("check of the dashboard's queries") {
        return;
    }
    scenario("dashboard", |scratch| {
        let mut cluster = start(scratch)?;
        let _standby = cluster.add_standby(scratch, "standby")?;
        let conninfo = cluster.readers_conninfo("test");
        wait_for(secs(60), "a slot", || {
            Sql::connect(&conninfo)?.rows("CREATE_REPLICATION_SLOT archive PHYSICAL RESERVE_WAL")
        })?;
        let prometheus = Prometheus::start(
            scratch,
            &[
                ("safekeeper", cluster.safekeepers.iter().map(|safekeeper| safekeeper.http_address()).collect()),
                ("walproposer", vec![cluster.walproposer.http_address()]),
            ],
        )?;
        // Prometheus sees a change only between two scrapes; an election is what writes control files.
        wait_for(secs(60), "the first scrapes", || {
            ensure!(prometheus.query("up == 1")?.len() == 4, "not all targets are up");
            Ok(())
        })?;
        cluster.walproposer.kill()?;
        cluster.walproposer.start()?;
        cluster.wait_synchronous()?;
        cluster.primary.pgbench_init(scratch, 1)?;
        cluster.primary.pgbench(scratch, secs(120), &["-c", "2", "-T", "3"])?;
        let mut checked = 0;
        for (file, expression) in dashboard_queries()? {
            let query = fill_in(&expression);
            let what = format!("{}: {expression}", file.display());
            if MAY_BE_EMPTY.iter().any(|(empty, _)| *empty == expression) {
                prometheus.query(&query).with_context(|| what.clone())?;
            } else {
                wait_for(secs(30), &format!("data for {what}"), || {
                    // A quantile over nothing is a series too, of NaN.
                    let series = prometheus.query(&query)?;
                    let numbers =
                        series.iter().filter(|one| one.pointer("/value/1").is_some_and(|value| value != "NaN"));
                    ensure!(numbers.count() > 0, "no number for {query}: {series:?}");
                    Ok(())
                })?;
            }
            checked += 1;
        }
        ensure!(checked > 0, "no query in grafana/");
        println!("{checked} queries find data");
        Ok(())
    });
}

#[test]
fn alert_rules_are_valid() {
    if !have_prometheus("check of the alert rules") {
        return;
    }
    for path in grafana_files(&["yml", "yaml"]).unwrap() {
        promtool(&["check", "rules", &path.display().to_string()], "").unwrap();
    }
}

fn grafana_files(extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extensions.iter().any(|wanted| extension == *wanted)) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// All queries of all dashboards: of panels, annotations and variables.
fn dashboard_queries() -> Result<BTreeSet<(PathBuf, String)>> {
    let mut queries = BTreeSet::new();
    for file in grafana_files(&["json"])? {
        let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
        let mut found = Vec::new();
        collect(&dashboard, &mut found)?;
        queries.extend(found.into_iter().map(|query| (file.clone(), query)));
    }
    Ok(queries)
}

/// Every `expr`, and every `label_values(selector, label)` of a variable, at any depth.
fn collect(value: &Value, found: &mut Vec<String>) -> Result<()> {
    match value {
        Value::Array(items) => items.iter().try_for_each(|item| collect(item, found)),
        Value::Object(fields) => {
            for (name, field) in fields {
                match (name.as_str(), field.as_str()) {
                    ("expr", Some(expression)) => found.push(expression.to_owned()),
                    ("query", Some(text)) if text.contains('(') => found.push(selector_of(text)?),
                    _ => collect(field, found)?,
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// `selector` of `label_values(selector, label)`.
fn selector_of(text: &str) -> Result<String> {
    let inner = text.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
    match inner.and_then(|inner| inner.rsplit_once(',')) {
        Some((selector, _)) => Ok(selector.trim().to_owned()),
        None => bail!("a variable's query of a kind this test does not know: {text}"),
    }
}

/// Puts values in place of Grafana's variables: everything is selected, and time windows are short.
fn fill_in(expression: &str) -> String {
    let mut out = String::new();
    let mut rest = expression;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let braced = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
        let (name, tail) = braced.unwrap_or_else(|| {
            let end = after.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(after.len());
            after.split_at(end)
        });
        out.push_str(match name.split(':').next().unwrap_or_default() {
            "__rate_interval" | "__interval" | "__range" => "30s",
            _ => ".*",
        });
        rest = tail;
    }
    out + rest
}

#[test]
fn variables_are_filled_in() {
    let expression = r#"sum(rate(x{tenant_id=~"$tenant", node=~"${node:regex}"}[$__rate_interval]))"#;
    assert_eq!(fill_in(expression), r#"sum(rate(x{tenant_id=~".*", node=~".*"}[30s]))"#);
    assert_eq!(selector_of(r#"label_values(up{job="a"}, instance)"#).unwrap(), r#"up{job="a"}"#);
}
