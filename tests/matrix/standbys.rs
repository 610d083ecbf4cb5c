//! Hot standbys of each version, fed by nothing but the safekeepers. A query on the standby follows each step.

use anyhow::{Result, ensure};
use testkit::{Cluster, Scratch};

use crate::{commit_step, for_each_version, see_step, standby, step};

for_each_version!(a_standby_without_a_slot_hops_between_nodes_as_they_are_killed);

fn a_standby_without_a_slot_hops_between_nodes_as_they_are_killed(
    scratch: &Scratch,
    cluster: &mut Cluster,
) -> Result<()> {
    let standby = standby(scratch, cluster, "standby", &[])?;
    step(cluster, &[&standby], "streaming")?;
    for round in 0..cluster.safekeepers.len() {
        let source = cluster.source_of(&standby)?;
        cluster.safekeeper(source)?.kill()?;
        let away = format!("round {round}: its node is away");
        commit_step(&cluster.primary, &away)?;
        see_step(cluster, &standby, &away)?;
        let other = cluster.source_of(&standby)?;
        ensure!(other != source, "it reads from the node that was killed");
        cluster.safekeeper(source)?.start()?;
    }
    step(cluster, &[&standby], "after all of it")?;
    let end = cluster.primary.flush_lsn()?;
    cluster.wait_committed(end)?;
    cluster.compare_all(end).map(drop)
}
