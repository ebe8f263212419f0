//! Every change that hostagent can make to a host is one [`Step`], and [`apply`] is the one place
//! where a host is changed. A step is a value that a pure plan made, perhaps some time ago: a step
//! that could destroy or misplace data checks its precondition again at the moment it runs, on what
//! it is about to touch. Every step has a deadline of its own, because a step that has begun is not
//! interrupted by the end of the run.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::info;

use crate::aws::cache::{self, Confirmation};
use crate::config::{Config, Filesystem};
use crate::control::Context;
use crate::gate::{self, NOT_ON_DISK};
use crate::host::block::{self, Content, VolumeId};
use crate::host::migration::{self, Place};
use crate::host::tree::Progress;
use crate::host::uevents::Uevents;
use crate::host::{command, files, mounts, processes, sshd};

/// One change to the host, or one wait for something that changes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Step {
    /// Wait until EC2 has the configured volume attached and the kernel has its disk.
    AwaitVolume {
        /// EC2's device name.
        device: String,
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
    /// Make a filesystem on the volume, if its disk is blank at that moment.
    FormatVolume {
        /// The volume.
        volume_id: VolumeId,
        /// The filesystem to make.
        filesystem: Filesystem,
        /// The UUID it gets.
        uuid: uuid::Uuid,
    },
    /// Make an empty, immutable directory to mount on.
    PrepareMountPoint {
        /// The directory.
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
        /// The volume that must be mounted there.
        volume_id: VolumeId,
    },
    /// Make systemd read its unit files again.
    ReloadManager,
    /// Mount the volume by its mount unit.
    MountVolume {
        /// The unit.
        unit: String,
        /// The device file that the unit mounts.
        link: PathBuf,
        /// The volume that this must be.
        volume_id: VolumeId,
    },
    /// Start a unit.
    StartUnit {
        /// The unit.
        unit: String,
    },
    /// Stop Docker and containerd, and what would start them again.
    StopDocker,
    /// Stop containers that outlived Docker.
    StopContainers,
    /// Remove a file.
    RemoveFile {
        /// The file.
        path: PathBuf,
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
        /// The port.
        port: u16,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AwaitVolume { device, seconds } => {
                write!(f, "wait up to {seconds} s for the volume {device} to be attached")
            }
            Self::RememberVolume { confirmation } => {
                write!(f, "remember that EC2 confirmed {}", confirmation.volume_id)
            }
            Self::ForgetVolume => f.write_str("forget that EC2 confirmed a volume"),
            Self::FormatVolume { volume_id, filesystem, .. } => {
                write!(f, "format the blank volume {volume_id} with {}", filesystem.as_str())
            }
            Self::PrepareMountPoint { path } => {
                write!(f, "make {} an empty, immutable directory", path.display())
            }
            Self::WriteFile { path, .. } => write!(f, "write {}", path.display()),
            Self::MakeDirectory { path, mode, .. } => {
                write!(f, "make the directory {} (mode {mode:04o})", path.display())
            }
            Self::ReloadManager => f.write_str("make systemd read its units again"),
            Self::MountVolume { unit, volume_id, .. } => write!(f, "mount {volume_id} ({unit})"),
            Self::StartUnit { unit } => write!(f, "start {unit}"),
            Self::StopDocker => f.write_str("stop Docker and containerd"),
            Self::StopContainers => f.write_str("stop the containers that outlive Docker"),
            Self::RemoveFile { path } => write!(f, "remove {}", path.display()),
            Self::MigrateStorage { place: Place { directory, target, volume } } => write!(
                f,
                "move the data of {} to {} on {volume}",
                directory.display(),
                target.display()
            ),
            Self::EraseMigrated { place } => {
                write!(f, "overwrite and remove the old copy {}", place.left().display())
            }
            Self::MoveSshd { port } => write!(f, "move sshd to port {port}"),
        }
    }
}

/// How long a unit may take to start or stop.
const UNIT_DEADLINE: Duration = Duration::from_secs(300);

/// How long making a filesystem may take.
const FORMAT_DEADLINE: Duration = Duration::from_secs(900);

/// How long flushing a new filesystem may take.
const FLUSH_DEADLINE: Duration = Duration::from_secs(300);

/// Between two questions to EC2 while nothing happens in the kernel.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// Changes the host by one step.
pub async fn apply(step: &Step, cx: &Context) -> Result<()> {
    match step {
        Step::AwaitVolume { seconds, .. } => await_volume(cx, *seconds).await,
        Step::RememberVolume { confirmation } => cache::write(confirmation),
        Step::ForgetVolume => files::remove(Path::new(cache::PATH)),
        Step::FormatVolume { volume_id, filesystem, uuid } => {
            format_volume(volume_id, *filesystem, *uuid).await
        }
        Step::PrepareMountPoint { path } => prepare_mount_point(path),
        Step::WriteFile { path, content, mode } => files::write_atomic(path, content, *mode),
        Step::MakeDirectory { path, mode, volume_id } => make_directory(path, *mode, volume_id),
        Step::ReloadManager => cx.host.systemd().await?.reload_manager().await,
        Step::MountVolume { unit, link, volume_id } => {
            mount_volume(cx, unit, link, volume_id).await
        }
        Step::StartUnit { unit } => cx.host.systemd().await?.start(unit, UNIT_DEADLINE).await,
        Step::StopDocker => stop_docker(cx).await,
        Step::StopContainers => processes::stop_containers().await,
        Step::RemoveFile { path } => files::remove(path),
        Step::MigrateStorage { place } => migrate_storage(cx, place).await,
        Step::EraseMigrated { place } => erase_migrated(cx, place).await,
        Step::MoveSshd { port } => sshd::move_port(cx.host.systemd().await?, *port).await,
    }
}

/// Waits on the kernel's events. EC2 is asked again only when a disk appeared that its last answer
/// does not explain, and once a minute otherwise.
async fn await_volume(cx: &Context, seconds: u32) -> Result<()> {
    let mut until = Instant::now() + Duration::from_secs(seconds.into());
    if let Some(deadline) = cx.deadline {
        until = until.min(deadline);
    }
    let events = Uevents::subscribe()?;
    let mut ask_again = Instant::now() + ASK_AGAIN;
    let mut soon = Duration::from_secs(2);
    let mut said = String::new();
    loop {
        let disks = block::disks()?;
        let volumes = cx.aws.attached_volumes(&disks).await;
        let missing = missing(&cx.config, &disks, volumes.known().map_err(|u| u.0));
        let Some(missing) = missing else { return Ok(()) };
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
            event = timeout_at(until, events.block_event()) => {
                if let Ok(result) = event {
                    result?;
                }
            }
            () = sleep_until(ask_again) => {
                cx.aws.forget_volumes().await;
                ask_again = Instant::now() + ASK_AGAIN;
            }
        }
    }
}

/// What is still missing of the volume, if anything is.
fn missing(
    config: &Config,
    disks: &[block::Disk],
    volumes: Result<&Vec<crate::aws::ec2::AttachedVolume>, String>,
) -> Option<String> {
    let device = &config.volume.device;
    let volumes = match volumes {
        Ok(volumes) => volumes,
        Err(why) => return Some(format!("whether {device} is attached is not known ({why})")),
    };
    let here = volumes.iter().find(|v| v.device.as_deref().is_some_and(|d| device.is(d)));
    let Some(volume) = here else { return Some(format!("EC2 has no volume attached as {device}")) };
    if volume.attachment.as_deref() != Some("attached") {
        return Some(format!("EC2 has not finished attaching {} as {device}", volume.volume_id));
    }
    let id = &volume.volume_id;
    match disks.iter().find(|d| d.volume_id().as_ref() == Some(id)) {
        None => Some(format!("the kernel has no disk with the serial number of {id}")),
        Some(disk) => match block::link_by_id(disk) {
            Ok(Some(_)) => None,
            Ok(None) => Some(format!("udev has not made the link to {id} yet")),
            Err(e) => Some(format!("{e:#}")),
        },
    }
}

/// The step that can destroy data. Everything that led to it is proven again here, on the opened
/// device: the serial number, that nobody uses it, and that it is blank.
async fn format_volume(
    volume_id: &VolumeId,
    filesystem: Filesystem,
    uuid: uuid::Uuid,
) -> Result<()> {
    let disk = block::disk_of_volume(volume_id)?
        .with_context(|| format!("the kernel has no disk with the serial number of {volume_id}"))?;
    let users = block::users(&disk)?;
    ensure!(users.is_empty(), "{volume_id} is in use: {}", users.join(", "));

    // An open descriptor keeps the kernel from giving this name to another disk; the lock keeps
    // udev from probing meanwhile (https://systemd.io/BLOCK_DEVICE_LOCKING).
    let pinned = block::open_checked(&disk, OpenOptions::new().read(true).write(true))?;
    let locked =
        lock(pinned).await.with_context(|| format!("locking {}", disk.path().display()))?;
    {
        // O_EXCL on a block device fails while anybody (a mount, a mapping, mkfs) has it so open.
        let mut exclusive = OpenOptions::new();
        exclusive.read(true).custom_flags(nix::libc::O_EXCL);
        let _held = block::open_checked(&disk, &exclusive)
            .with_context(|| format!("{volume_id} is in use, though nothing explains by whom"))?;
        match block::content(&disk).await? {
            Content::Blank { .. } => {}
            other => bail!("{volume_id} is not blank any more: {other:?}"),
        }
    }
    let path = disk.path();
    let path = path.to_str().context("a device name that is not UTF-8")?;
    let uuid = uuid.to_string();
    let Filesystem::Ext4 = filesystem;
    // mkfs opens the disk exclusively itself, and refuses one in use; our own exclusive descriptor
    // had to be given up for that. No discard: there is nothing to discard on a blank disk.
    let args = ["-q", "-E", "nodiscard", "-L", LABEL, "-U", &uuid, path];
    command::run(command::MKFS_EXT4, &args, FORMAT_DEADLINE).await?.success()?;
    // In a thread: a disk that hangs must not hang the whole program.
    let flush = tokio::task::spawn_blocking(move || locked.sync_all());
    let flushed = timeout(FLUSH_DEADLINE, flush).await;
    flushed
        .with_context(|| format!("{path} was not flushed within {} s", FLUSH_DEADLINE.as_secs()))?
        .context("flushing the disk")?
        .with_context(|| format!("flushing {path}"))
}

/// Takes the lock as soon as it is free: udev holds it while it probes a disk that has just come.
async fn lock(mut file: File) -> Result<Flock<File>> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((_, e)) if Instant::now() > until => return Err(e.into()),
            Err((unlocked, Errno::EWOULDBLOCK)) => file = unlocked,
            Err((_, e)) => return Err(e.into()),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// The label of the filesystem that hostagent makes.
pub const LABEL: &str = "hostagent-data";

/// Docker's units in the order in which they are stopped: the socket first, because it would start
/// Docker again.
pub const DOCKER_UNITS: [&str; 3] = ["docker.socket", "docker.service", "containerd.service"];

async fn stop_docker(cx: &Context) -> Result<()> {
    let systemd = cx.host.systemd().await?;
    for unit in DOCKER_UNITS {
        if systemd.unit(unit).await?.is_up() {
            systemd.stop(unit, UNIT_DEADLINE).await?;
        }
    }
    Ok(())
}

/// The step after which Docker's data is elsewhere. That nothing of Docker's runs, uses the directory
/// or is mounted in it is proven here; the rest, on what is on the disks, where it is moved.
async fn migrate_storage(cx: &Context, place: &Place) -> Result<()> {
    let device = device_of(&place.volume)?;
    let systemd = cx.host.systemd().await?;
    for unit in DOCKER_UNITS {
        ensure!(!systemd.unit(unit).await?.is_up(), "{unit} is up again");
    }
    let containers = processes::containers()?;
    ensure!(containers.is_empty(), "containers run: {}", containers.join(", "));
    let directory = &place.directory;
    ensure!(mounts::at(directory)?.is_empty(), "something is mounted on {}", directory.display());
    // What is left of containers; the last first. By systemd, so that every namespace sees it.
    for mount in mounts::all()?.into_iter().rev() {
        let point = Path::new(&mount.mount_point);
        if !point.starts_with(directory) {
            continue;
        }
        ensure!(
            NOT_ON_DISK.contains(&mount.fs_type.as_str()),
            "{} is mounted from the device {} inside of {}; unmount it, and see what mounts it",
            mount.mount_point,
            mount.device,
            directory.display()
        );
        systemd.stop(&mounts::unit_name(point, "mount"), UNIT_DEADLINE).await?;
    }
    let place = place.clone();
    watched("docker-storage", move |progress| {
        let idle = || {
            let users = processes::users_of(&place.directory)?;
            ensure!(
                users.is_empty(),
                "{} is in use: {}",
                place.directory.display(),
                users.join("; ")
            );
            Ok(())
        };
        migration::migrate(&place, device, &idle, progress)
    })
    .await
}

/// The other step that destroys data: only what is proven to be on the confirmed volume, and in use.
async fn erase_migrated(cx: &Context, place: &Place) -> Result<()> {
    let device = device_of(&place.volume)?;
    // Both directories are mounted from the volume that EC2 confirmed for this instance.
    gate::check(&cx.config.volume).context("the gate is closed")?;
    let there = |path: &Path| -> Result<_> {
        use std::os::unix::fs::MetadataExt as _;
        let meta =
            std::fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
        Ok((block::DevNum::of(meta.dev()), meta.ino()))
    };
    let (seen, target) = (there(&place.directory)?, there(&place.target)?);
    ensure!(
        seen == target && seen.0 == device,
        "{} is not what is seen at {}",
        place.target.display(),
        place.directory.display()
    );
    let place = place.clone();
    watched("docker-storage", move |progress| migration::erase(&place, device, progress)).await
}

fn device_of(volume_id: &VolumeId) -> Result<block::DevNum> {
    let disk = block::disk_of_volume(volume_id)?
        .with_context(|| format!("the kernel has no disk with the serial number of {volume_id}"))?;
    Ok(disk.number)
}

/// How long work of no known length may make no progress. A flush of all memory to a slow volume makes
/// none either.
const STALLED: Duration = Duration::from_secs(900);

/// Between two lines about progress.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Does long work in a thread, says how far it is, and gives it up when it stands still.
async fn watched<T: Send + 'static>(
    control: &'static str,
    work: impl FnOnce(&Progress) -> Result<T> + Send + 'static,
) -> Result<T> {
    let progress = Arc::new(Progress::default());
    let shared = Arc::clone(&progress);
    let mut thread = tokio::task::spawn_blocking(move || work(&shared));
    let (mut moves, mut since) = (0, Instant::now());
    loop {
        tokio::select! {
            result = &mut thread => return result.context("the work ended without a result")?,
            () = sleep(SAY_EVERY) => {}
        }
        if progress.moves() != moves {
            (moves, since) = (progress.moves(), Instant::now());
            info!(control, "{}", progress.text());
        } else if since.elapsed() > STALLED {
            progress.cancel();
            bail!("{}: no progress for {} s", progress.text(), STALLED.as_secs());
        }
    }
}

fn prepare_mount_point(path: &Path) -> Result<()> {
    ensure!(mounts::at(path)?.is_empty(), "something is mounted on {}", path.display());
    files::prepare_mount_point(path)
}

fn make_directory(path: &Path, mode: u32, volume_id: &VolumeId) -> Result<()> {
    let disk = block::disk_of_volume(volume_id)?
        .with_context(|| format!("the kernel has no disk with the serial number of {volume_id}"))?;
    files::make_directory_on(path, mode, disk.number)
}

async fn mount_volume(cx: &Context, unit: &str, link: &Path, volume_id: &VolumeId) -> Result<()> {
    let disk = block::disk_of_volume(volume_id)?
        .with_context(|| format!("the kernel has no disk with the serial number of {volume_id}"))?;
    let leads_to =
        std::fs::metadata(link).with_context(|| format!("looking at {}", link.display()))?;
    let number = block::DevNum::of(std::os::unix::fs::MetadataExt::rdev(&leads_to));
    ensure!(number == disk.number, "{} leads to {number}, not to {volume_id}", link.display());
    cx.host.systemd().await?.start(unit, UNIT_DEADLINE).await
}
