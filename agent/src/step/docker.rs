//! What is done to Docker: its units, its configuration, and the move of its storage.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::time::{Instant, sleep};
use tracing::info;

use super::UNIT_DEADLINE;
use crate::config::Migrate;
use crate::control::Context;
use crate::gate::{self, NOT_ON_DISK};
use crate::host::docker_config::next_start::off_volume;
use crate::host::dockerd::json::Setting;
use crate::host::dockerd::transaction::{self, Then};
use crate::host::link::{self, Leads, Link};
use crate::host::migration::{self, Place};
use crate::host::systemd::Systemd;
use crate::host::tree::Progress;
use crate::host::{block, blocking, mounts, processes};
use crate::volume;

/// Docker's units in the order in which they are stopped: the socket first, because it would start
/// Docker again.
pub const DOCKER_UNITS: [&str; 3] = ["docker.socket", "docker.service", "containerd.service"];

/// How long containers that Docker stops with itself may take to be gone after it.
const ENDING: Duration = Duration::from_secs(5);

/// With live-restore, containers go on without Docker, and write where they did: they are stopped where
/// that is allowed, and named otherwise. What has to follow the stop does not follow then.
pub(super) async fn stop(cx: &Context) -> Result<()> {
    let systemd = cx.host.systemd().await?;
    for unit in DOCKER_UNITS {
        if systemd.unit(unit).await?.is_up() {
            systemd.stop(unit, UNIT_DEADLINE).await?;
        }
    }
    let until = Instant::now() + ENDING;
    loop {
        let containers = processes::containers()?;
        if containers.is_empty() {
            return Ok(());
        }
        if cx.config.docker.migrate == Migrate::Running {
            return processes::stop_containers().await;
        }
        ensure!(
            Instant::now() < until,
            "Docker is stopped, and containers go on without it ({}); {}",
            processes::short(&containers),
            processes::TO_STOP
        );
        sleep(Duration::from_millis(500)).await;
    }
}

/// Docker is started, by this as by anything else, only where the gate would let it start.
pub(super) async fn configure(cx: &Context, settings: &[Setting], then: Then) -> Result<()> {
    let systemd = cx.host.systemd().await?;
    if matches!(then, Then::Start | Then::Restart) {
        gate::check(&cx.config.volume).context("the gate is closed")?;
        // What the gate cannot see.
        if let Some(what) = off_volume(systemd, cx.config.volume.mount_point.path()).await? {
            bail!("{what}");
        }
    }
    let stop_containers = cx.config.docker.migrate == Migrate::Running;
    transaction::configure(systemd, settings, then, stop_containers).await
}

/// That nothing of Docker's runs.
async fn is_down(systemd: &Systemd) -> Result<()> {
    for unit in DOCKER_UNITS {
        ensure!(!systemd.unit(unit).await?.is_up(), "{unit} is up again");
    }
    let containers = processes::containers()?;
    ensure!(containers.is_empty(), "containers run: {}", containers.join(", "));
    Ok(())
}

/// Nothing is mounted on or in a directory of Docker's afterwards: what containers left there is
/// unmounted. The last first, and by systemd, so that every namespace sees it.
async fn clear_mounts(systemd: &Systemd, directory: &Path) -> Result<()> {
    ensure!(mounts::at(directory)?.is_empty(), "something is mounted on {}", directory.display());
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
    Ok(())
}

/// That no process uses a directory.
fn is_idle(directory: &Path) -> Result<()> {
    let users = processes::users_of(directory)?;
    ensure!(users.is_empty(), "{} is in use: {}", directory.display(), users.join("; "));
    Ok(())
}

/// Where the link leads is looked at again by what replaces it; here, that nothing uses what is there.
pub(super) async fn replace_link(cx: &Context, place: &Place) -> Result<()> {
    let device = volume::find_again(cx, &place.volumes).await?.number();
    let systemd = cx.host.systemd().await?;
    is_down(systemd).await?;
    if let Some(Link { leads: Leads::Beside(real), .. }) = link::look(place, Some(device))? {
        clear_mounts(systemd, &real).await?;
    }
    let place = place.clone();
    blocking(move || link::replace(&place, device, &is_idle)).await
}

/// The step after which Docker's data is elsewhere. That nothing of Docker's runs, uses the directory
/// or is mounted in it is proven here; the rest, on what is on the disks, where it is moved.
pub(super) async fn migrate(cx: &Context, place: &Place) -> Result<()> {
    let device = volume::find_again(cx, &place.volumes).await?.number();
    let systemd = cx.host.systemd().await?;
    is_down(systemd).await?;
    clear_mounts(systemd, &place.directory).await?;
    let place = place.clone();
    watched("docker-storage", move |progress| {
        migration::migrate(&place, device, &is_idle, progress)
    })
    .await
}

/// The other step that destroys data: only what is proven to be on the confirmed volume, and in use.
pub(super) async fn erase(cx: &Context, place: &Place) -> Result<()> {
    let device = volume::find_again(cx, &place.volumes).await?.number();
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
    watched("docker-storage", move |progress| migration::erase(&place, device, &is_idle, progress))
        .await
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
