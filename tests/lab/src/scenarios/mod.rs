//! The scenarios, in one explicit list. Each shows one thing on an instance of its own.

mod boot;
mod containers;
mod daemon;
mod destroy;
mod faults;
mod foreign;
mod format;
mod host;
mod identity;
mod leaks;
mod migration;
mod oldest;
mod ready;
mod reboots;
mod refused;
mod remote;
mod sshd;

use crate::image::{DEFAULT_RELEASE, OLDEST_RELEASE};
use crate::stage::{Stage, Start};
use anyhow::Result;

/// One scenario.
pub struct Scenario {
    /// A stable name in kebab case.
    pub name: &'static str,
    /// What it shows, as one line.
    pub shows: &'static str,
    /// The Debian release of its instance.
    pub release: &'static str,
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
    Scenario { name, shows, release: DEFAULT_RELEASE, start: Start::Installed, run }
}

/// The same on the oldest release, where that differs: systemd 252, Docker 20.10, OpenSSH 9.2, Linux
/// 6.1. Any scenario can be run there by hand, with `--release`.
const fn on_oldest(
    name: &'static str,
    shows: &'static str,
    run: fn(&mut Stage) -> Result<()>,
) -> Scenario {
    Scenario { release: OLDEST_RELEASE, ..installed(name, shows, run) }
}

/// All scenarios, in the order they run.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "boot",
        shows: "the lab itself: an instance with its identity, metadata service and NVMe disks",
        release: DEFAULT_RELEASE,
        start: Start::Booted,
        run: boot::run,
    },
    Scenario {
        name: "cold-boot",
        shows: "user-data installs the package at the first boot, and the host becomes ready",
        release: DEFAULT_RELEASE,
        start: Start::Cold,
        run: ready::cold_boot,
    },
    installed(
        "ready",
        "a bare host becomes ready and says so; at most 3 EC2 calls",
        ready::becomes_ready,
    ),
    on_oldest(
        "ready-bookworm",
        "the same with Debian 12; and there containers, a hung Docker, its data-root, a cold boot",
        oldest::ready,
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
        "assembled",
        "two encrypted volumes beneath LVM become one data volume, and no other disk joins them",
        identity::assembled,
    ),
    installed(
        "weakest",
        "of volumes beneath LVM the weakest counts, and what somebody made of a disk is his",
        identity::weakest,
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
        "interrupted-format",
        "a format that was killed anywhere is finished; with one foreign byte it is refused",
        format::interrupted,
    ),
    installed(
        "named-unrecognised",
        "what nothing recognises is destroyed only on the volume that is named",
        format::named_unrecognised,
    ),
    installed(
        "hidden-signature",
        "what only the second probe recognises is refused, named or not",
        format::hidden_signature,
    ),
    installed(
        "xfs",
        "ready on XFS with ftype=1, once mkfs.xfs is there; it grows with its volume",
        format::xfs,
    ),
    installed(
        "growth",
        "ext4 grows with its volume while it is mounted, when configured",
        format::growth,
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
    on_oldest(
        "migration-bookworm",
        "the same with Docker 20.10 and Linux 6.1",
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
        "linked",
        "a link in the place of Docker's storage gives way to a directory, and nothing is lost",
        migration::linked,
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
    installed(
        "sshd-socket",
        "under Debian's ssh.socket sshd moves, with a session open, and stays so after a boot",
        sshd::socket,
    ),
    on_oldest("sshd-socket-bookworm", "the same with OpenSSH 9.2 and systemd 252", sshd::socket),
    installed(
        "sshd-generator",
        "under Ubuntu's ssh.socket and a generator like Ubuntu's, and a drop-in against it",
        sshd::generator,
    ),
    installed(
        "sshd-lines",
        "ports and addresses in the operator's files are dealt with, and put back on a failure",
        sshd::lines,
    ),
    on_oldest("sshd-lines-bookworm", "the same with OpenSSH 9.2", sshd::lines),
    installed(
        "sshd-cut",
        "after a power cut in the middle of the move sshd answers, and the next run finishes it",
        sshd::cut,
    ),
    installed(
        "sshd-hardening",
        "passwords end when somebody has a key; a Match block is not missed; report; undone",
        sshd::hardening,
    ),
    installed(
        "remote-docker",
        "Docker answers another machine over SSH on 2222, by a key, once the host is ready",
        remote::remote,
    ),
    installed("impostor", "another server on sshd's port is not taken for sshd", refused::impostor),
    installed(
        "data-root",
        "Docker that is told to keep its data elsewhere starts only if that is on the volume",
        refused::data_root,
    ),
    installed(
        "docker-daemon",
        "Docker's own configuration is put right in the operator's file, or put back, or named",
        daemon::daemon,
    ),
    installed("snap", "Docker as a snap is recognised, and refused", refused::snap),
    installed(
        "containers",
        "a container with a directory of another disk is named, and the host not ready",
        containers::containers,
    ),
    installed(
        "image-store",
        "the same where containerd keeps layers, and for containers that are not Docker's",
        containers::image_store,
    ),
    installed(
        "hung-docker",
        "a Docker that hangs is unknown in time, and what containers write to is seen all the same",
        containers::hung,
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
    installed("swap", "swap on the root disk is turned off, and does not come back", leaks::swap),
    installed(
        "core-dumps",
        "the memory of a container that crashes does not reach the root disk",
        leaks::core_dumps,
    ),
    installed(
        "root-plain",
        "a root volume that is not encrypted: refused, or left without what containers say",
        leaks::root_plain,
    ),
    installed(
        "logs-plain",
        "logs on a volume of their own that is not encrypted, beside a root volume that is",
        leaks::logs_plain,
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
        faults::errors,
    ),
    installed(
        "disk-mapped",
        "a blank disk under a device mapping (linear, flakey, error) is refused",
        faults::mapped,
    ),
    installed(
        "disk-faulty",
        "a data device over dm-error or dm-flakey, which fails, drops or garbles, is never called ours",
        faults::faulty,
    ),
    installed(
        "disk-hangs",
        "a disk that answers no more makes nothing hang and nothing pass",
        faults::hangs,
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
