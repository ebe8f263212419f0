//! Every change that hostagent can make to a host is one [`Step`], and [`apply`] is the one place
//! where a host is changed. A step is a value that a pure plan made, perhaps some time ago: a step
//! that could destroy or misplace data checks its precondition again at the moment it runs, on what
//! it is about to touch. Every step has a deadline of its own, because a step that has begun is not
//! interrupted by the end of the run.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::info;

use crate::aws::cache::{self, Confirmation};
use crate::config::Filesystem;
use crate::control::Context;
use crate::host::ahead::Ahead;
use crate::host::beneath;
use crate::host::block::{self, Volumes};
use crate::host::chain;
use crate::host::dockerd::json::Setting;
use crate::host::dockerd::transaction::Then;
use crate::host::format::{self, Onto, Order};
use crate::host::migration::Place;
use crate::host::sshd::hardening;
use crate::host::sshd::transaction::{self, Change};
use crate::host::uevents::Uevents;
use crate::host::{files, growth, kernel, mounts, processes, swap};
use crate::volume::{self, State};

mod docker;

pub use docker::DOCKER_UNITS;

/// One change to the host, or one wait for something that changes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Step {
    /// Wait until EC2 has the configured volume attached and the kernel has its disk.
    AwaitVolume {
        /// Which one, in words.
        volume: String,
        /// The longest wait.
        seconds: u32,
    },
    /// Remember that EC2 confirmed the volume.
    RememberVolume {
        /// What is remembered.
        confirmation: Confirmation,
    },
    /// Forget that EC2 confirmed a volume, so that the gate closes.
    ForgetVolume,
    /// Make a filesystem on the volume, if its disk holds at that moment what the plan has seen.
    FormatVolume {
        /// The volume.
        volumes: Volumes,
        /// The filesystem to make.
        filesystem: Filesystem,
        /// The UUID it gets.
        uuid: uuid::Uuid,
        /// What it is made over.
        onto: Onto,
    },
    /// Remove what is kept of a format that is complete.
    ForgetFormat {
        /// The volume.
        volumes: Volumes,
    },
    /// Enlarge the mounted filesystem to the size of its volume.
    GrowFilesystem {
        /// The volume.
        volumes: Volumes,
        /// The filesystem.
        filesystem: Filesystem,
        /// Where it is mounted.
        mount_point: PathBuf,
    },
    /// Make an empty, immutable directory to mount on.
    PrepareMountPoint {
        /// The directory.
        path: PathBuf,
    },
    /// Make the directory that a mount hides immutable, if it is empty.
    GuardMountPoint {
        /// The mount point.
        path: PathBuf,
    },
    /// Replace a file.
    WriteFile {
        /// The file.
        path: PathBuf,
        /// Its new content.
        content: String,
        /// Its mode.
        mode: u32,
    },
    /// Make a directory on the mounted data volume.
    MakeDirectory {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The volumes that must be mounted there.
        volumes: Volumes,
    },
    /// Make systemd read its unit files again.
    ReloadManager,
    /// Mount the volume by its mount unit.
    MountVolume {
        /// The unit.
        unit: String,
        /// The device file that the unit mounts.
        link: PathBuf,
        /// The volumes that this must be.
        volumes: Volumes,
    },
    /// Start a unit.
    StartUnit {
        /// The unit.
        unit: String,
    },
    /// Stop a unit.
    StopUnit {
        /// The unit.
        unit: String,
    },
    /// Stop a unit and start it again, so that it reads its configuration.
    RestartUnit {
        /// The unit.
        unit: String,
    },
    /// Stop swapping to a file or device, if what is there fits into memory at that moment.
    StopSwap {
        /// Its unit.
        unit: String,
        /// The file or device.
        path: String,
    },
    /// Set a parameter of the running kernel.
    SetKernel {
        /// Its name, such as `kernel.core_pattern`.
        name: String,
        /// Its new value.
        value: String,
    },
    /// Stop Docker and containerd, what would start them again, and containers that outlive them, where
    /// that is allowed.
    StopDocker,
    /// Stop containers that outlived Docker.
    StopContainers,
    /// Remove a file.
    RemoveFile {
        /// The file.
        path: PathBuf,
    },
    /// Put the directory that a link in the place of a storage directory leads to into its place.
    ReplaceLink {
        /// The storage directory.
        place: Place,
    },
    /// Move what a storage directory of Docker's holds to the data volume.
    MigrateStorage {
        /// From where to where.
        place: Place,
    },
    /// Erase what was moved from the root disk.
    EraseMigrated {
        /// From where to where it was moved.
        place: Place,
    },
    /// Move sshd to a port, and away from all others.
    MoveSshd {
        /// The port, and what has to be changed for it.
        change: Change,
    },
    /// Change Docker's configuration file, and have Docker take it up.
    ConfigureDocker {
        /// The keys that are set; none where the file is right.
        settings: Vec<Setting>,
        /// How Docker takes it up.
        then: Then,
    },
    /// Make these settings the first that sshd reads.
    HardenSshd {
        /// All that our file is to say.
        wanted: Vec<hardening::Setting>,
        /// Whether logins with passwords end with it.
        passwords: bool,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AwaitVolume { volume, seconds } => {
                write!(f, "wait up to {seconds} s for a volume to be attached {volume}")
            }
            Self::RememberVolume { confirmation } => {
                write!(f, "remember that EC2 confirmed {}", confirmation.ids())
            }
            Self::ForgetVolume => f.write_str("forget that EC2 confirmed a volume"),
            Self::FormatVolume { volumes, filesystem, onto, .. } => {
                let filesystem = filesystem.as_str();
                match onto {
                    Onto::Blank => {
                        write!(f, "format the blank volume {volumes} with {filesystem}")
                    }
                    Onto::Unfinished => {
                        write!(
                            f,
                            "finish formatting {volumes} with {filesystem}, which was interrupted"
                        )
                    }
                    Onto::Unrecognised => write!(
                        f,
                        "format {volumes} with {filesystem}, over what nothing recognises there, as \
                         volume.format_unrecognised allows"
                    ),
                }
            }
            Self::ForgetFormat { volumes } => {
                write!(f, "remove what is kept of the finished format of {volumes}")
            }
            Self::GrowFilesystem { volumes, mount_point, .. } => {
                let place = mount_point.display();
                write!(f, "enlarge the filesystem on {place} to the size of {volumes}")
            }
            Self::PrepareMountPoint { path } => {
                write!(f, "make {} an empty, immutable directory", path.display())
            }
            Self::GuardMountPoint { path } => {
                write!(f, "make the directory beneath the mount on {} immutable", path.display())
            }
            Self::WriteFile { path, .. } => write!(f, "write {}", path.display()),
            Self::MakeDirectory { path, mode, .. } => {
                write!(f, "make the directory {} (mode {mode:04o})", path.display())
            }
            Self::ReloadManager => f.write_str("make systemd read its units again"),
            Self::MountVolume { unit, volumes, .. } => write!(f, "mount {volumes} ({unit})"),
            Self::StartUnit { unit } => write!(f, "start {unit}"),
            Self::StopUnit { unit } => write!(f, "stop {unit}"),
            Self::RestartUnit { unit } => write!(f, "restart {unit}"),
            Self::StopSwap { path, .. } => write!(f, "stop swapping to {path}"),
            Self::SetKernel { name, value } => write!(f, "set {name} to {value}"),
            Self::StopDocker => f.write_str("stop Docker and containerd"),
            Self::StopContainers => f.write_str("stop the containers that outlive Docker"),
            Self::RemoveFile { path } => write!(f, "remove {}", path.display()),
            Self::ReplaceLink { place } => {
                write!(f, "make {} a directory instead of a link", place.directory.display())
            }
            Self::MigrateStorage { place: Place { directory, target, volumes } } => write!(
                f,
                "move the data of {} to {} on {volumes}",
                directory.display(),
                target.display()
            ),
            Self::EraseMigrated { place } => {
                write!(f, "overwrite and remove the old copy {}", place.left().display())
            }
            Self::MoveSshd { change } => {
                write!(f, "move sshd to port {}", change.port)?;
                change.edits.iter().try_for_each(|edit| write!(f, "; {edit}"))
            }
            Self::ConfigureDocker { settings, then } => {
                if !settings.is_empty() {
                    let words = settings.iter().map(ToString::to_string).collect::<Vec<_>>();
                    write!(f, "in Docker's configuration, set {}", words.join(", "))?;
                }
                let and = if settings.is_empty() { "" } else { ", and " };
                match then {
                    Then::Leave => Ok(()),
                    Then::Reload => write!(f, "{and}have Docker read it again"),
                    Then::Start => write!(f, "{and}start docker.service"),
                    Then::Restart => write!(f, "{and}restart docker.service"),
                }
            }
            Self::HardenSshd { wanted, .. } => {
                let words = wanted.iter().map(|w| format!("{} {}", w.keyword, w.value));
                write!(f, "have sshd read first: {}", words.collect::<Vec<_>>().join("; "))
            }
        }
    }
}

/// How long a unit may take to start or stop.
const UNIT_DEADLINE: Duration = Duration::from_secs(300);

/// How long udev may take to make the link to what is to be mounted.
const LINK_DEADLINE: Duration = Duration::from_secs(30);

/// Between two questions to EC2 while nothing happens in the kernel.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// Changes the host by one step.
pub async fn apply(step: &Step, cx: &Context) -> Result<()> {
    match step {
        Step::AwaitVolume { seconds, .. } => await_volume(cx, *seconds).await,
        Step::RememberVolume { confirmation } => cache::write(confirmation),
        Step::ForgetVolume => files::remove(Path::new(cache::PATH)),
        Step::FormatVolume { volumes, filesystem, uuid, onto } => {
            format_volume(cx, volumes, *filesystem, *uuid, *onto).await
        }
        Step::ForgetFormat { volumes } => format::forget(volumes),
        Step::GrowFilesystem { volumes, filesystem, mount_point } => {
            let device = volume::find_again(cx, volumes).await?;
            growth::grow(&device, *filesystem, mount_point).await
        }
        Step::PrepareMountPoint { path } => prepare_mount_point(path),
        Step::GuardMountPoint { path } => beneath::make_immutable(path),
        Step::WriteFile { path, content, mode } => files::write_atomic(path, content, *mode),
        Step::MakeDirectory { path, mode, volumes } => {
            make_directory(cx, path, *mode, volumes).await
        }
        Step::ReloadManager => cx.host.systemd().await?.reload_manager().await,
        Step::MountVolume { unit, link, volumes } => mount_volume(cx, unit, link, volumes).await,
        Step::StartUnit { unit } => cx.host.systemd().await?.start(unit, UNIT_DEADLINE).await,
        Step::StopUnit { unit } => cx.host.systemd().await?.stop(unit, UNIT_DEADLINE).await,
        Step::RestartUnit { unit } => cx.host.systemd().await?.restart(unit, UNIT_DEADLINE).await,
        Step::StopSwap { unit, path } => stop_swap(cx, unit, path).await,
        Step::SetKernel { name, value } => kernel::set(name, value),
        Step::StopDocker => docker::stop(cx).await,
        Step::StopContainers => processes::stop_containers().await,
        Step::RemoveFile { path } => files::remove(path),
        Step::ReplaceLink { place } => docker::replace_link(cx, place).await,
        Step::MigrateStorage { place } => docker::migrate(cx, place).await,
        Step::EraseMigrated { place } => docker::erase(cx, place).await,
        Step::MoveSshd { change } => transaction::move_port(cx.host.systemd().await?, change).await,
        Step::ConfigureDocker { settings, then } => docker::configure(cx, settings, *then).await,
        Step::HardenSshd { wanted, passwords } => {
            hardening::harden(cx.host.systemd().await?, wanted, *passwords).await
        }
    }
}

/// Waits on the kernel's events. EC2 is asked again only when a disk appeared that its last answer
/// does not explain, and once a minute otherwise.
async fn await_volume(cx: &Context, seconds: u32) -> Result<()> {
    let mut until = Instant::now() + Duration::from_secs(seconds.into());
    if let Some(deadline) = cx.deadline {
        until = until.min(deadline);
    }
    Ahead::prepare();
    let events = Uevents::subscribe()?;
    let mut ask_again = Instant::now() + ASK_AGAIN;
    let mut soon = Duration::from_secs(2);
    let mut said = String::new();
    let (mut before, mut event) = (block::disks()?, Instant::now());
    loop {
        let disks = block::disks()?;
        // mkfs has its image to make, whatever EC2 says of the disk in the meantime; unless something
        // is to stand on the disk first, which gets the filesystem.
        let is_new = |disk: &&block::Disk| !before.contains(disk);
        let whole = cx.config.volume.assembled.is_none();
        for disk in disks.iter().filter(is_new).filter(|_| whole) {
            cx.host.ahead.begin(disk, cx.config.volume.filesystem, event).await;
        }
        before.clone_from(&disks);
        let volumes = cx.aws.attached_volumes(&disks).await;
        let Some(missing) = missing(cx).await else { return Ok(()) };
        if missing != said {
            info!(control = "data-volume", "{missing}; waiting for it");
            said.clone_from(&missing);
        }
        // No answer, or a disk with a volume's serial that EC2 does not report yet.
        let unexplained = volumes.known().map_or(true, |volumes| {
            disks.iter().filter_map(block::Disk::volume_id).any(|id| {
                !volumes
                    .iter()
                    .any(|v| v.volume_id == id && v.attachment.as_deref() == Some("attached"))
            })
        });
        if unexplained {
            ask_again = ask_again.min(Instant::now() + soon);
            soon = (soon * 2).min(ASK_AGAIN);
        }
        if Instant::now() >= until {
            bail!("{missing}, after {seconds} s");
        }
        tokio::select! {
            seen = timeout_at(until, events.block_event()) => {
                if let Ok(result) = seen {
                    result?;
                    event = Instant::now();
                }
            }
            () = sleep_until(ask_again) => {
                cx.aws.forget_volumes().await;
                ask_again = Instant::now() + ASK_AGAIN;
            }
        }
    }
}

/// What is still missing of the volume, if anything is. What is wrong with it is nothing to wait for.
async fn missing(cx: &Context) -> Option<String> {
    let device = match volume::look(cx).await {
        Ok(State::Missing(misfit)) => return Some(misfit.observed),
        Ok(State::Unfit(_)) => return None,
        Ok(State::Fit(fit)) => fit.device,
        Err(e) => return Some(format!("{e:#}")),
    };
    match chain::stable_name(&device.layer) {
        Ok(Some(_)) => None,
        Ok(None) => Some(format!("udev has not made the link to {} yet", device.volumes)),
        Err(e) => Some(format!("{e:#}")),
    }
}

/// The step that can destroy data. Everything that led to it is proven again there, on the opened
/// disk; that unrecognised content may be destroyed is asked of the configuration again here.
async fn format_volume(
    cx: &Context,
    volumes: &Volumes,
    filesystem: Filesystem,
    uuid: uuid::Uuid,
    onto: Onto,
) -> Result<()> {
    let device = volume::find_again(cx, volumes).await?;
    let named = &cx.config.volume.format_unrecognised;
    let allowed = volumes.ids().iter().all(|id| named.contains(id));
    let instance_id = cx.aws.identity().await?.instance_id.clone();
    let volumes = volumes.clone();
    let order = Order { volumes, filesystem, uuid, onto, allowed, instance_id };
    format::format(&order, &device, &cx.host.ahead).await
}

async fn stop_swap(cx: &Context, unit: &str, path: &str) -> Result<()> {
    // By the kernel's table alone: a swap that cannot be looked at any more can still be stopped.
    let used = swap::in_use()?.into_iter().find(|(name, _)| name == path).map(|(_, used)| used);
    let Some(used) = used else { return Ok(()) };
    let available = swap::available_memory()?;
    ensure!(
        swap::fits(used, available),
        "{path} holds {} MiB, and only {} MiB of memory are available; stop what takes memory",
        used >> 20,
        available >> 20
    );
    cx.host.systemd().await?.stop(unit, UNIT_DEADLINE).await
}

fn prepare_mount_point(path: &Path) -> Result<()> {
    ensure!(mounts::at(path)?.is_empty(), "something is mounted on {}", path.display());
    files::prepare_mount_point(path)
}

async fn make_directory(cx: &Context, path: &Path, mode: u32, volumes: &Volumes) -> Result<()> {
    let device = volume::find_again(cx, volumes).await?;
    files::make_directory_on(path, mode, device.number())
}

async fn mount_volume(cx: &Context, unit: &str, link: &Path, volumes: &Volumes) -> Result<()> {
    let device = volume::find_again(cx, volumes).await?;
    let events = Uevents::subscribe()?;
    let until = Instant::now() + LINK_DEADLINE;
    let leads_to = loop {
        match std::fs::metadata(link) {
            // By a filesystem's UUID it is there when udev has looked at what was just made.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && Instant::now() < until => {
                if let Ok(result) = timeout_at(until, events.block_event()).await {
                    result?;
                }
            }
            result => break result.with_context(|| format!("looking at {}", link.display()))?,
        }
    };
    let number = block::DevNum::of(std::os::unix::fs::MetadataExt::rdev(&leads_to));
    ensure!(number == device.number(), "{} leads to {number}, not to {volumes}", link.display());
    cx.host.systemd().await?.start(unit, UNIT_DEADLINE).await
}
