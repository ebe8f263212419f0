//! Making a filesystem on a disk so that no instant of it can destroy or lose anything.
//!
//! mkfs never sees the disk. It makes the filesystem in a sparse file of the disk's size on the root
//! disk, the *image*, whose few megabytes are then copied to the disk through the one descriptor that
//! was opened exclusively, whose serial number was checked and on which blankness was proven. mkfs
//! may therefore run beside the proof; the disk is written to after both.
//!
//! The *intent*, a small file beside the image, is made durable before the first write to the disk. It
//! allows one thing: at the next run, on that volume and this instance, the same image may be written
//! again, if every sector that is read is zero or the image's ([`Content::Unfinished`]). The sector
//! that makes it a filesystem is written last, after everything else was flushed and read back: a
//! filesystem that can be recognised is complete, whatever became of the intent.
//!
//! Which disk, when, and over what is decided by the plan of the control `data-filesystem`; the step
//! calls [`format()`], which proves all of it again.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};
use uuid::Uuid;

use super::ahead::Ahead;
use super::block::{self, Volumes};
use super::content::{self, BLOCK, Buffer, Content, Inspection, ReadAt, Reader, SECTOR};
use super::device::{DataDevice, Held};
use super::{command, files};
use crate::config::Filesystem;

mod image;
pub use image::Image;
use image::ZEROS;
pub(super) use image::{make_image, make_room};

/// Where images and intents are kept while a filesystem is made.
pub const DIR: &str = "/var/lib/hostagent/format";

/// The form of the intent.
const VERSION: u32 = 1;

/// How long mkfs may take on a file.
const MKFS_DEADLINE: Duration = Duration::from_secs(300);

/// How long the proof of blankness may take: the first read of a volume that was made from a
/// snapshot fetches it from S3.
const PROOF_DEADLINE: Duration = Duration::from_secs(300);

/// How long copying the image may take.
const COPY_DEADLINE: Duration = Duration::from_secs(900);

/// What a filesystem is made over: what the plan has seen, and the step must still see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Onto {
    /// A blank disk.
    Blank,
    /// What an interrupted format of ours has left.
    Unfinished,
    /// Content that nothing recognises, which the operator allows to be destroyed.
    Unrecognised,
}

/// What is to be made, and where.
#[derive(Debug, Clone)]
pub struct Order {
    /// The volumes.
    pub volumes: Volumes,
    /// The filesystem.
    pub filesystem: Filesystem,
    /// The UUID it gets.
    pub uuid: Uuid,
    /// What it is made over.
    pub onto: Onto,
    /// Whether the operator allows unrecognised content of this volume to be destroyed.
    pub allowed: bool,
    /// The instance that this is.
    pub instance_id: String,
}

/// What was about to be written to which volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The form of this file.
    pub version: u32,
    /// The instance.
    pub instance_id: String,
    /// The volumes.
    pub volumes: Volumes,
    /// The filesystem.
    pub filesystem: Filesystem,
    /// The UUID it is to have.
    pub uuid: Uuid,
    /// The disk's size in bytes.
    pub size: u64,
    /// The image's [`Image::checksum`].
    pub checksum: String,
}

impl Intent {
    /// Whether this is about that filesystem on that disk of that instance.
    #[must_use]
    pub fn is_for(&self, instance_id: &str, device: &DataDevice, filesystem: Filesystem) -> bool {
        self.version == VERSION
            && self.instance_id == instance_id
            && self.volumes == device.volumes
            && self.filesystem == filesystem
            && self.uuid == device.volumes.filesystem_uuid()
            && self.size == device.size()
    }
}

fn intent_path(volumes: &Volumes) -> PathBuf {
    Path::new(DIR).join(format!("{}.json", volumes.key()))
}

fn image_path(volumes: &Volumes) -> PathBuf {
    Path::new(DIR).join(format!("{}.img", volumes.key()))
}

/// The intent that is kept for a volume. One that cannot be read is an error.
pub fn intent(volumes: &Volumes) -> Result<Option<Intent>> {
    let path = intent_path(volumes);
    let doing = || format!("reading {}", path.display());
    let Some(text) = files::read_optional(&path)? else { return Ok(None) };
    let intent: Intent = serde_json::from_str(&text).with_context(doing)?;
    ensure!(intent.version == VERSION, "{} has an unknown version", path.display());
    Ok(Some(intent))
}

/// Whether anything of a format is kept for a volume.
pub fn remains(volumes: &Volumes) -> Result<bool> {
    for path in [intent_path(volumes), image_path(volumes)] {
        match fs::symlink_metadata(&path) {
            Ok(_) => return Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("looking at {}", path.display())),
        }
    }
    Ok(false)
}

/// Removes what is kept of a format. The intent first: without its image it allows nothing.
pub fn forget(volumes: &Volumes) -> Result<()> {
    if remains(volumes)? {
        files::remove(&intent_path(volumes))?;
        files::remove(&image_path(volumes))?;
    }
    Ok(())
}

/// The image that an intent speaks of, if it is whole.
pub async fn image_of(intent: &Intent) -> Result<Arc<Image>> {
    let intent = intent.clone();
    let load = move |_| {
        let path = image_path(&intent.volumes);
        let image = Image::open(&path, intent.filesystem, intent.uuid, intent.size)?;
        let checksum = image.checksum()?;
        ensure!(checksum == intent.checksum, "{} is not what was written there", path.display());
        Ok(Arc::new(image))
    };
    content::in_time(Instant::now(), MKFS_DEADLINE, load).await
}

/// The program that makes a filesystem, and the package that has it.
#[must_use]
pub fn tool(filesystem: Filesystem) -> (&'static str, &'static str) {
    match filesystem {
        Filesystem::Ext4 => (command::MKFS_EXT4, "e2fsprogs"),
        Filesystem::Xfs => (command::MKFS_XFS, "xfsprogs"),
    }
}

/// Whether the program that makes a filesystem is installed.
pub fn installed(filesystem: Filesystem) -> Result<bool> {
    let (program, _) = tool(filesystem);
    match fs::metadata(program) {
        Ok(meta) => Ok(meta.is_file()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("looking at {program}")),
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Makes the filesystem. Everything that led to it is proven again here, on the opened disk: the
/// serial number, that nobody uses it, and what is on it.
pub async fn format(order: &Order, device: &DataDevice, ahead: &Ahead) -> Result<()> {
    let began = Instant::now();
    let volumes = &order.volumes;
    ensure!(device.volumes == *volumes, "the data volume is {} by now", device.volumes);
    let users = block::users(device.number())?;
    ensure!(users.is_empty(), "{volumes} is in use: {}", users.join(", "));

    // The lock keeps udev from probing meanwhile (https://systemd.io/BLOCK_DEVICE_LOCKING).
    let pinned = device.open(OpenOptions::new().read(true).write(true))?;
    let locked =
        lock(pinned).await.with_context(|| format!("locking {}", device.path().display()))?;
    // From here to the end nobody can mount, map or format it: O_EXCL on a block device fails while
    // anybody has it so open, and keeps everybody else from opening it so.
    let mut exclusive = OpenOptions::new();
    exclusive.read(true).write(true).custom_flags(nix::libc::O_EXCL | nix::libc::O_DIRECT);
    let opened = device
        .open(&exclusive)
        .with_context(|| format!("{volumes} is in use, though nothing explains by whom"))?;

    // What was begun is finished with the image that is there: for a disk that is not blank, an
    // intent must not be lost before the filesystem is complete.
    let kept = match order.onto {
        Onto::Blank => None,
        Onto::Unfinished => Some(begun(order, device).await?),
        Onto::Unrecognised => begun(order, device).await.ok(),
    };
    let (image, mkfs, seen) = if let Some(image) = kept {
        let compare = (order.onto == Onto::Unfinished).then(|| image.clone());
        let seen = content::inspect_opened(&opened, device, compare, PROOF_DEADLINE).await?;
        still(order, &seen, true)?;
        (image, Duration::ZERO, seen)
    } else {
        let proof = async {
            let seen = content::inspect_opened(&opened, device, None, PROOF_DEADLINE).await?;
            still(order, &seen, false)?;
            Ok(seen)
        };
        let made = async {
            match ahead.take(device, order.filesystem).await {
                Some(made) => Ok(made),
                None => make_image(device, order.filesystem, order.uuid, began).await,
            }
        };
        match tokio::try_join!(made, proof) {
            Ok(((image, took), seen)) => (image, took, seen),
            Err(e) => {
                // mkfs, if it still ran, is killed; what it made is not wanted.
                if let Err(left) = forget(volumes) {
                    warn!(control = "data-filesystem", "something is left of the image: {left:#}");
                }
                return Err(e);
            }
        }
    };

    let write = {
        let (image, order, device) = (image.clone(), order.clone(), device.clone());
        move |deadline| write(&opened, &image, &order, &device, deadline)
    };
    let start = Instant::now();
    let written = content::in_time(start, COPY_DEADLINE, write)
        .await
        .with_context(|| format!("writing to {}", device.path().display()))?;
    // The filesystem is complete: it can be recognised from here on, and by nothing before.
    drop(image);
    drop(locked);
    forget(volumes)?;
    let (mkfs_ms, copy_ms, total_ms) = (ms(mkfs), ms(start.elapsed()), ms(began.elapsed()));
    let (proof_ms, proof_bytes) = (seen.milliseconds, seen.bytes);
    info!(
        control = "data-filesystem",
        proof_ms,
        proof_bytes,
        mkfs_ms,
        copy_ms,
        copy_bytes = written,
        total_ms,
        "{} is written to {volumes} in {total_ms} ms (proof {proof_ms}, mkfs {mkfs_ms}, copy {copy_ms})",
        order.filesystem.as_str()
    );
    Ok(())
}

/// The image with which this order was begun by a run that was interrupted.
async fn begun(order: &Order, device: &DataDevice) -> Result<Arc<Image>> {
    let intent = intent(&order.volumes)?.context("what was begun is not known any more")?;
    ensure!(
        intent.is_for(&order.instance_id, device, order.filesystem),
        "what was begun is not what is to be made: {intent:?}"
    );
    image_of(&intent).await
}

/// Whether the device holds what the plan has seen; `begun` is whether an earlier run has begun to
/// write to it.
fn still(order: &Order, seen: &Inspection, begun: bool) -> Result<()> {
    let (id, onto, content) = (&order.volumes, order.onto, &seen.content);
    if let Some(copy) = seen.remnant_of(order.uuid)
        && onto == Onto::Unrecognised
        && !begun
    {
        bail!(
            "{id} held hostagent's own filesystem: a copy of its superblock is at byte {}",
            copy.at
        );
    }
    match (onto, content) {
        // An interrupted format may have been interrupted before its first write.
        (Onto::Blank | Onto::Unfinished, Content::Blank { .. })
        | (Onto::Unfinished, Content::Unfinished { .. }) => Ok(()),
        (Onto::Unrecognised, Content::Unrecognised { .. }) if order.allowed => Ok(()),
        _ => bail!("{id} does not hold what it did when this was planned ({onto:?}): {content:?}"),
    }
}

/// Takes the lock as soon as it is free: udev holds it while it probes a disk that has just come.
async fn lock(mut file: Held<File>) -> Result<Held<Flock<File>>> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match file.try_map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock)) {
            Ok(locked) => return Ok(locked),
            Err((_, e)) if Instant::now() > until => return Err(e.into()),
            Err((unlocked, Errno::EWOULDBLOCK)) => file = unlocked,
            Err((_, e)) => return Err(e.into()),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// The one place where a disk is written to.
fn write(
    opened: &File,
    image: &Image,
    order: &Order,
    device: &DataDevice,
    deadline: std::time::Instant,
) -> Result<u64> {
    if order.onto != Onto::Unfinished {
        let intent = Intent {
            version: VERSION,
            instance_id: order.instance_id.clone(),
            volumes: order.volumes.clone(),
            filesystem: order.filesystem,
            uuid: order.uuid,
            size: device.size(),
            checksum: image.checksum()?,
        };
        let mut text = serde_json::to_string_pretty(&intent).context("writing down the intent")?;
        text.push('\n');
        files::write_atomic(&intent_path(&order.volumes), &text, 0o600)?;
    }
    // At the moment of writing: the kernel's word on the device that is open.
    device.check(opened)?;
    let (onto, allowed, size) = (order.onto, order.allowed, device.size());
    Copy { device: opened, image, onto, allowed, size, deadline }.run()
}

/// A disk to copy to; a trait so that tests can cut the power.
trait Device: ReadAt {
    fn write_once(&self, bytes: &[u8], offset: u64) -> std::io::Result<usize>;
    fn flush(&self) -> std::io::Result<()>;
}

impl ReadAt for &File {
    fn read_at_once(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        (**self).read_at_once(buffer, offset)
    }
}

impl Device for &File {
    fn write_once(&self, bytes: &[u8], offset: u64) -> std::io::Result<usize> {
        loop {
            match self.write_at(bytes, offset) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn flush(&self) -> std::io::Result<()> {
        self.sync_all()
    }
}

/// The copy of an image to a disk.
struct Copy<'a, D> {
    device: D,
    image: &'a Image,
    onto: Onto,
    allowed: bool,
    size: u64,
    deadline: std::time::Instant,
}

impl<D: Device + Clone> Copy<'_, D> {
    fn run(&self) -> Result<u64> {
        let mut ranges = self.image.touches();
        let mut overwrite = self.onto == Onto::Unrecognised;
        if !overwrite {
            // What is about to be written, and what the filesystem relies on, was not all read for
            // the proof of blankness.
            let image = (self.onto == Onto::Unfinished).then_some(self.image);
            let mut reader = Reader::new(self.device.clone(), self.deadline);
            let walk = content::walk_over(&mut reader, &content::merged(ranges.clone()), image)?;
            match walk.foreign {
                Some(_) if self.allowed && image.is_none() => overwrite = true,
                Some(byte) => bail!(
                    "the disk is not blank: there is data at byte {byte}; if it may be destroyed, \
                     name the volume in volume.format_unrecognised"
                ),
                None => {}
            }
        }
        if overwrite {
            // Nothing of what was there may be taken for a signature later.
            ranges.extend(content::ends(self.size));
        }
        let ranges = content::merged(ranges);
        let mut written = 0;
        for (at, length) in content::chunks(&ranges) {
            written += self.copy(at, length, overwrite)?;
        }
        self.flush()?;
        // Read back before the disk says that it carries this filesystem. What was read as zero a
        // moment ago, and is not written to, is not read again.
        self.compare(if overwrite { &ranges } else { &self.image.extents })?;
        let mut head = Buffer::new();
        let head = head.first(BLOCK);
        self.image.read(0, head)?;
        self.write(head, 0)?;
        self.flush()?;
        let mut reader = Reader::new(self.device.clone(), self.deadline);
        ensure!(reader.chunk(0, BLOCK)? == head, "the superblock was not written as it was meant");
        Ok(written + BLOCK as u64)
    }

    /// What the disk is to hold before the last write: the image without the sector that makes it a
    /// filesystem. A sector is written whole or not at all, even when the power fails.
    fn expected(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.image.read(at, bytes)?;
        if at == 0 {
            let primary = usize::try_from(self.image.superblock.primary)?;
            bytes[primary..primary + SECTOR].fill(0);
        }
        Ok(())
    }

    fn copy(&self, at: u64, length: usize, overwrite: bool) -> Result<u64> {
        let mut buffer = Buffer::new();
        let bytes = buffer.first(length);
        self.expected(at, bytes)?;
        if overwrite {
            self.write(bytes, at)?;
            return Ok(length as u64);
        }
        // Runs of blocks that are not zero: elsewhere the disk is.
        let mut written = 0;
        let mut start = None;
        for end in (0..=length).step_by(BLOCK) {
            let zero = bytes.get(end..end + BLOCK).is_none_or(|block| *block == ZEROS);
            match (start, zero) {
                (None, false) => start = Some(end),
                (Some(from), true) => {
                    self.write(&bytes[from..end], at + from as u64)?;
                    written += (end - from) as u64;
                    start = None;
                }
                _ => {}
            }
        }
        Ok(written)
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        ensure!(std::time::Instant::now() < self.deadline, "at byte {at}: writing takes too long");
        let doing = || format!("writing at byte {at}");
        let written = self.device.write_once(bytes, at).with_context(doing)?;
        ensure!(
            written == bytes.len(),
            "at byte {at}: {written} bytes of {} were written",
            bytes.len()
        );
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.device.flush().context("flushing")
    }

    fn compare(&self, ranges: &[(u64, u64)]) -> Result<()> {
        let mut reader = Reader::new(self.device.clone(), self.deadline);
        let mut expected = vec![0; content::CHUNK];
        for (at, length) in content::chunks(ranges) {
            self.expected(at, &mut expected[..length])?;
            ensure!(
                reader.chunk(at, length)? == &expected[..length],
                "what was written at byte {at} reads back differently"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
