//! The scenarios, in one explicit list. Each shows one thing on an instance of its own.

mod boot;
mod host;
mod migration;
mod ready;
mod reboots;
mod refused;

use crate::stage::{Stage, Start};
use anyhow::Result;

/// One scenario.
pub struct Scenario {
    /// A stable name in kebab case.
    pub name: &'static str,
    /// What it shows, as one line.
    pub shows: &'static str,
    /// What it starts from.
    pub start: Start,
    /// The scenario itself: it fails by returning an error.
    pub run: fn(&mut Stage) -> Result<()>,
}

/// A scenario on a restored instance with our package installed.
const fn installed(
    name: &'static str,
    shows: &'static str,
    run: fn(&mut Stage) -> Result<()>,
) -> Scenario {
    Scenario { name, shows, start: Start::Installed, run }
}

/// All scenarios, in the order they run.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "boot",
        shows: "the lab itself: an instance with its identity, metadata service and NVMe disks",
        start: Start::Booted,
        run: boot::run,
    },
    Scenario {
        name: "cold-boot",
        shows: "user-data installs the package at the first boot, and the host becomes ready",
        start: Start::Cold,
        run: ready::cold_boot,
    },
    installed(
        "ready",
        "a bare host becomes ready and says so; at most 3 EC2 calls",
        ready::becomes_ready,
    ),
    installed(
        "second-run",
        "a second run on a ready host does, writes and restarts nothing",
        ready::second_run,
    ),
    installed(
        "late-volume",
        "a volume attached 40 s late is waited for on kernel events",
        ready::late_volume,
    ),
    installed(
        "foreign-disk",
        "a foreign blank disk that came first stays untouched",
        ready::foreign_disk,
    ),
    installed(
        "canary",
        "what a container writes is on the data disk and not on the root disk",
        ready::canary,
    ),
    installed(
        "gate",
        "from the installation on nothing starts Docker off the volume",
        refused::gate,
    ),
    installed(
        "unencrypted",
        "an unencrypted volume is not touched, and the host not ready",
        refused::unencrypted,
    ),
    installed(
        "other-encrypted",
        "another volume's encryption counts for nothing",
        refused::other_encrypted,
    ),
    installed(
        "shared-tenancy",
        "on shared hardware the host is not ready",
        refused::shared_tenancy,
    ),
    installed("denied", "what EC2 denies is unknown, and the host not ready", refused::denied),
    installed(
        "never-attached",
        "without the volume the host is not ready at the deadline",
        refused::never_attached,
    ),
    installed(
        "foreign-content",
        "a disk that nothing recognises but is not blank is refused",
        refused::foreign_content,
    ),
    installed(
        "used-docker",
        "data that is not to be moved from the root disk is neither hidden nor lost",
        refused::used_docker,
    ),
    installed(
        "migration",
        "what Docker had on the root disk is moved whole, and erased there",
        migration::migration,
    ),
    installed(
        "migration-running",
        "a running container is stopped only where that is configured",
        migration::running,
    ),
    installed(
        "migration-no-space",
        "what does not fit is refused before Docker stops",
        migration::no_space,
    ),
    installed(
        "migration-interrupted",
        "killed at any moment of a migration, the next run finishes it",
        migration::interrupted,
    ),
    installed(
        "hidden-data",
        "data beneath the mounts is found, named and left alone",
        migration::hidden,
    ),
    installed(
        "signal-lost",
        "a host that cannot say that it is ready is not",
        refused::signal_lost,
    ),
    installed(
        "sshd-conflict",
        "a change to sshd that cannot be completed is undone",
        refused::sshd_conflict,
    ),
    installed("impostor", "another server on sshd's port is not taken for sshd", refused::impostor),
    installed(
        "data-root",
        "Docker that is told to keep its data elsewhere does not start",
        refused::data_root,
    ),
    installed(
        "silent-metadata",
        "without the metadata service nothing passes and nothing hangs",
        refused::silent_metadata,
    ),
    installed("configuration", "a bad configuration changes nothing", refused::configuration),
    installed(
        "one-at-a-time",
        "a second run at the same time is turned away",
        refused::one_at_a_time,
    ),
    installed(
        "reboots",
        "ready again after a reboot; Docker down after one without the volume",
        reboots::reboots,
    ),
];
