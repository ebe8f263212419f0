//! The scenarios, in one explicit list. Each shows one thing on an instance of its own.

mod boot;
mod destroy;
mod foreign;
mod host;
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
        "data that Docker has on the root disk is neither hidden nor lost",
        refused::used_docker,
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
    installed(
        "foreign-tables",
        "GPT, MBR, LVM, LUKS, md, ZFS and random bytes are refused, byte for byte",
        foreign::tables,
    ),
    installed(
        "foreign-filesystems",
        "somebody's ext4, xfs, btrfs, swap and a wiped ext4 are refused, byte for byte",
        foreign::filesystems,
    ),
    installed(
        "foreign-clone",
        "hostagent's own filesystem of another volume is refused",
        foreign::clone,
    ),
    installed(
        "disk-errors",
        "a disk that cannot be read is not formatted, one that cannot be written not used",
        foreign::errors,
    ),
    installed(
        "disk-mapped",
        "a blank disk under a device mapping (linear, flakey, error) is refused",
        foreign::mapped,
    ),
    installed(
        "disk-hangs",
        "a disk that answers no more makes nothing hang and nothing pass",
        foreign::hangs,
    ),
    installed(
        "pci-order",
        "the disks come in another order at the next boot, and have each other's names",
        foreign::pci_order,
    ),
    installed(
        "state-lost",
        "a new instance without hostagent's state uses the volume with its data",
        foreign::state_lost,
    ),
    installed(
        "power-cut",
        "after a power cut at any moment no data is lost, and the host is ready or says why not",
        destroy::power_cut,
    ),
];
