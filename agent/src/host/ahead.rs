//! A filesystem's image that is begun at the moment in which a disk appears, before it is known
//! whether the disk is the data volume and blank. mkfs works on a file of the root disk, so nothing is
//! lost but its time if the image is not wanted; if it is, it is done when the proofs are.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant};
use tracing::{info, warn};

use super::block::{self, Disk, Volumes};
use super::device::DataDevice;
use super::format::{self, Image};
use crate::config::Filesystem;

/// The images that have been begun.
#[derive(Debug, Default)]
pub struct Ahead {
    begun: Mutex<Vec<Begun>>,
}

#[derive(Debug)]
struct Begun {
    device: DataDevice,
    filesystem: Filesystem,
    made: JoinHandle<Result<(Arc<Image>, Duration)>>,
}

impl Ahead {
    /// Does what can be done before any disk appears.
    pub fn prepare() {
        // What is wrong is found again, and said, when it matters.
        if let Err(e) = format::make_room() {
            info!("no image can be begun: {e:#}");
        }
    }

    /// Begins an image for a disk that has just appeared, if it may be wanted: the disk is an EBS
    /// volume that nobody uses and whose first block is empty, and nothing is kept of an earlier
    /// format of it. `event` is when the disk appeared.
    pub async fn begin(&self, disk: &Disk, filesystem: Filesystem, event: Instant) {
        let Some(volume) = disk.volume_id() else { return };
        let device = DataDevice::of_disk(volume, disk.clone());
        let mut begun = self.begun.lock().await;
        if begun.iter().any(|begun| begun.device.volumes == device.volumes) {
            return;
        }
        let wanted = |device: &DataDevice| -> Result<bool> {
            Ok(!format::remains(&device.volumes)?
                && block::users(device.number())?.is_empty()
                && device.starts_empty()?)
        };
        match wanted(&device) {
            Ok(true) => {}
            Ok(false) => return,
            Err(e) => return info!("no image is begun for {}: {e:#}", device.volumes),
        }
        let (for_task, uuid) = (device.clone(), device.volumes.filesystem_uuid());
        let made =
            tokio::spawn(
                async move { format::make_image(&for_task, filesystem, uuid, event).await },
            );
        begun.push(Begun { device, filesystem, made });
    }

    /// The image for a device, if it was begun: waits until it is made.
    pub async fn take(
        &self,
        device: &DataDevice,
        filesystem: Filesystem,
    ) -> Option<Result<(Arc<Image>, Duration)>> {
        let mut all = self.begun.lock().await;
        let is = |begun: &Begun| begun.device == *device && begun.filesystem == filesystem;
        let at = all.iter().position(is)?;
        let begun = all.swap_remove(at);
        drop(all);
        Some(begun.made.await.context("making the image").and_then(|made| made))
    }

    /// Removes the images that nobody took.
    pub async fn abandon(&self) {
        for begun in self.begun.lock().await.drain(..) {
            begun.made.abort();
            // The end of the task is the end of mkfs.
            drop(begun.made.await);
            abandon(&begun.device.volumes);
        }
    }
}

fn abandon(volumes: &Volumes) {
    if let Err(e) = format::forget(volumes) {
        warn!("something is left of the image for {volumes}: {e:#}");
    }
}
