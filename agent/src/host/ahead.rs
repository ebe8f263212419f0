//! A filesystem's image that is begun at the moment in which a disk appears, before it is known
//! whether the disk is the data volume and blank. mkfs works on a file of the root disk, so nothing is
//! lost but its time if the image is not wanted; if it is, it is done when the proofs are.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant};
use tracing::{info, warn};

use super::block::{self, Disk, Volumes};
use super::content;
use super::device::DataDevice;
use super::format::{self, Image};
use crate::config::Filesystem;

/// How long a look at a disk that has just come may take.
const GLANCE: Duration = Duration::from_secs(2);

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
    /// volume that nobody uses, and nothing is kept of an earlier format of it. Gives it up if the
    /// disk's first block is not empty. `event` is when the disk appeared.
    pub async fn begin(&self, disk: &Disk, filesystem: Filesystem, event: Instant) {
        let Some(volume) = disk.volume_id() else { return };
        let device = DataDevice::of_disk(volume, disk.clone());
        let mut begun = self.begun.lock().await;
        if begun.iter().any(|begun| begun.device.volumes == device.volumes) {
            return;
        }
        let wanted = |device: &DataDevice| -> Result<bool> {
            Ok(!format::remains(&device.volumes)? && block::users(device.number())?.is_empty())
        };
        match wanted(&device) {
            Ok(true) => {}
            Ok(false) => return,
            Err(e) => return info!("no image is begun for {}: {e:#}", device.volumes),
        }
        let made = tokio::spawn(make_if_empty(device.clone(), filesystem, event));
        begun.push(Begun { device, filesystem, made });
        drop(begun);
        // There is one thread, and whoever calls has requests to prepare: mkfs goes first.
        tokio::task::yield_now().await;
    }

    /// The image for a device, if it was begun and not given up: waits until it is made.
    pub async fn take(
        &self,
        device: &DataDevice,
        filesystem: Filesystem,
    ) -> Option<(Arc<Image>, Duration)> {
        let mut all = self.begun.lock().await;
        let at = all.iter().position(|begun| begun.device.volumes == device.volumes)?;
        let begun = all.swap_remove(at);
        drop(all);
        if begun.device != *device || begun.filesystem != filesystem {
            begun.give_up().await;
            return None;
        }
        match begun.made.await.context("making the image").and_then(|made| made) {
            Ok(made) => Some(made),
            // Whoever wants it makes one, and meets the same error if it is one.
            Err(e) => {
                info!("the image that was begun for {} is none: {e:#}", device.volumes);
                None
            }
        }
    }

    /// Removes the images that nobody took.
    pub async fn abandon(&self) {
        for begun in self.begun.lock().await.drain(..) {
            begun.give_up().await;
        }
    }
}

impl Begun {
    async fn give_up(self) {
        self.made.abort();
        // The end of the task is the end of mkfs.
        drop(self.made.await);
        remove(&self.device.volumes);
    }
}

/// mkfs does not wait for the disk, but there is no use in going on with it if something is there.
async fn make_if_empty(
    device: DataDevice,
    filesystem: Filesystem,
    event: Instant,
) -> Result<(Arc<Image>, Duration)> {
    let uuid = device.volumes.filesystem_uuid();
    let made = format::make_image(&device, filesystem, uuid, event);
    let looked_at = device.clone();
    let look = content::in_time(event, GLANCE, move |_| {
        ensure!(looked_at.starts_empty()?, "something is on {}", looked_at.volumes);
        Ok(())
    });
    let made = tokio::try_join!(made, look);
    if made.is_err() {
        remove(&device.volumes);
    }
    made.map(|(made, ())| made)
}

fn remove(volumes: &Volumes) {
    if let Err(e) = format::forget(volumes) {
        warn!("something is left of the image for {volumes}: {e:#}");
    }
}
