//! Flags of Neon's safekeeper that a start script may pass and that have no effect here (spec: semantics 18).
//!
//! Such a flag is never ignored in silence. One whose absence only means that a feature does not run gets a warning at
//! startup. One that somebody relies on for security, for a limit or for where data goes stops the start, unless its
//! value says "off".

use clap::{Arg, ArgMatches, Command};

use super::ConfigError;

/// A flag that is understood but not supported.
pub struct ForeignFlag {
    name: &'static str,
    effect: Effect,
}

enum Effect {
    /// Going on without it is harmless; the text completes "--flag has no effect: ...".
    None(&'static str),
    /// Going on without it is not; the text completes "--flag is not supported by this version: ...".
    Refused(&'static str),
}

#[cfg(test)]
impl ForeignFlag {
    pub(super) fn name(&self) -> &'static str {
        self.name
    }
}

const fn no_effect(name: &'static str, why: &'static str) -> ForeignFlag {
    ForeignFlag { name, effect: Effect::None(why) }
}

const fn refused(name: &'static str, why: &'static str) -> ForeignFlag {
    ForeignFlag { name, effect: Effect::Refused(why) }
}

const NO_BROKER: &str = "there is no storage broker; safekeepers talk to each other directly, see --peers";
const NO_BACKUP: &str = "WAL is not uploaded to object storage, it stays on the local disk";
const NO_EVICTION: &str = "idle timelines cost next to nothing and are never evicted from the local disk";
const NO_FANOUT: &str = "every reader has its own stream";
const NO_TLS: &str = "TLS is missing; without it clients would connect in the clear. Remove the flag and protect the network, \
                      or use a TLS proxy";
const NO_AUTH: &str = "authentication is missing; without it everybody who reaches the port would be let in. Remove the flag \
                       and listen on a trusted network only";
const NO_LIMIT: &str = "the limit would not be kept and the disk could fill up. Remove the flag and watch the disk";

/// The flags of Neon's safekeeper that are not settings of ours.
pub(super) const NEON_SAFEKEEPER: &[ForeignFlag] = &[
    no_effect("broker-endpoint", NO_BROKER),
    no_effect("broker-keepalive-interval", NO_BROKER),
    no_effect("disable-periodic-broker-push", NO_BROKER),
    no_effect("heartbeat-timeout", NO_BROKER),
    no_effect("peer-recovery", "a lagging safekeeper is brought up to date by the proposer"),
    no_effect("disable-wal-backup", NO_BACKUP),
    no_effect("max-offloader-lag", NO_BACKUP),
    no_effect("max-reelect-offloader-lag-bytes", NO_BACKUP),
    no_effect("partial-backup-concurrency", NO_BACKUP),
    no_effect("partial-backup-timeout", NO_BACKUP),
    no_effect("wal-backup-parallel-jobs", NO_BACKUP),
    no_effect("delete-offloaded-wal", NO_EVICTION),
    no_effect("enable-offload", NO_EVICTION),
    no_effect("eviction-min-resident", NO_EVICTION),
    no_effect("walsenders-keep-horizon", "connected readers always hold WAL, see --max-slot-wal-keep-size"),
    no_effect("max-delta-for-fanout", NO_FANOUT),
    no_effect("wal-reader-fanout", NO_FANOUT),
    no_effect("control-file-save-interval", "when the control file is saved is not configurable"),
    no_effect("current-thread-runtime", "the number of threads follows the number of processors"),
    no_effect("dev", "there are no security checks to skip"),
    no_effect("force-metric-collection-on-scrape", "metrics are always collected inside the scrape"),
    no_effect("global-disk-check-interval", "disk usage is not checked"),
    no_effect("hcc-base-url", "timelines are not pulled at startup"),
    no_effect("ssl-cert-reload-period", "there are no certificates"),
    refused("auth-token-path", NO_AUTH),
    refused("http-auth-public-key-path", NO_AUTH),
    refused("listen-pg-tenant-only", NO_AUTH),
    refused("pg-auth-public-key-path", NO_AUTH),
    refused("pg-tenant-only-auth-public-key-path", NO_AUTH),
    refused("enable-tls-wal-service-api", NO_TLS),
    refused("listen-https", NO_TLS),
    refused("ssl-ca-file", NO_TLS),
    refused("ssl-cert-file", NO_TLS),
    refused("ssl-key-file", NO_TLS),
    refused("use-https-safekeeper-api", NO_TLS),
    refused("max-global-disk-usage-ratio", NO_LIMIT),
    refused("max-timeline-disk-usage-bytes", NO_LIMIT),
    refused(
        "enable-pull-timeline-on-startup",
        "an emptied node would come back without the WAL it once acknowledged. Remove the flag",
    ),
    refused(
        "remote-storage",
        "WAL would not be uploaded to object storage. Remove the flag and keep the local disks, which hold all WAL",
    ),
];

/// Values by which a script says "off".
const OFF: [&str; 4] = ["", "false", "0", "0.0"];

/// Teaches `command` the flags, hidden from its help. Whether they take a value differs, so each may have one.
pub(super) fn add_to(command: Command, flags: &[ForeignFlag]) -> Command {
    command.args(flags.iter().map(|flag| {
        Arg::new(flag.name).long(flag.name).hide(true).num_args(0..=1).default_missing_value("true").value_name("VALUE")
    }))
}

/// Warnings for the flags in `matches` that have no effect.
///
/// # Errors
/// For a flag that must not be ignored.
pub(super) fn judge(matches: &ArgMatches, flags: &[ForeignFlag]) -> Result<Vec<String>, ConfigError> {
    let mut warnings = Vec::new();
    for flag in flags {
        let Some(value) = matches.get_one::<String>(flag.name) else { continue };
        match flag.effect {
            Effect::None(why) => warnings.push(format!("--{} has no effect: {why}", flag.name)),
            Effect::Refused(_) if OFF.contains(&value.as_str()) => {}
            Effect::Refused(why) => return Err(ConfigError::Unsupported { flag: flag.name, why }),
        }
    }
    Ok(warnings)
}
