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

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};
use uuid::Uuid;

use super::ahead::Ahead;
use super::block::{self, Volumes};
use super::content::{self, BLOCK, Buffer, Content, Inspection, ReadAt, Reader, SECTOR};
use super::device::{DataDevice, Held};
use super::superblock::{self, Superblock};
use super::{command, files};
use crate::config::Filesystem;

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

/// A filesystem in a sparse file, as mkfs made it.
#[derive(Debug)]
pub struct Image {
    file: File,
    superblock: Superblock,
    /// Where the file has data, in whole blocks.
    extents: Vec<(u64, u64)>,
    /// What the filesystem takes to be zero beside it.
    zero: Vec<(u64, u64)>,
}

impl Image {
    fn open(path: &Path, filesystem: Filesystem, uuid: Uuid, size: u64) -> Result<Self> {
        let doing = || format!("reading {}", path.display());
        let file = File::open(path).with_context(doing)?;
        let length = file.metadata().with_context(doing)?.len();
        ensure!(length == size, "{} has {length} bytes, the disk {size}", path.display());
        let mut head = vec![0; superblock::HEAD];
        file.read_exact_at(&mut head, 0).with_context(doing)?;
        let superblock = Superblock::parse(&head)
            .with_context(|| format!("mkfs has made no filesystem in {}", path.display()))?;
        let whole = superblock.kind == filesystem.as_str()
            && superblock.uuid == uuid
            && superblock.ftype
            && superblock.size <= size;
        ensure!(whole, "mkfs has made something else in {}: {superblock:?}", path.display());
        let zero = superblock.relies_on_zero(|at, bytes| Ok(file.read_exact_at(bytes, at)?))?;
        ensure!(
            zero.iter().all(|(at, length)| at.checked_add(*length).is_some_and(|end| end <= size)),
            "the journal in {} is not within the disk",
            path.display()
        );
        let extents = extents(&file).with_context(doing)?;
        Ok(Self { file, superblock, extents, zero })
    }

    /// Everything that the filesystem needs to be as it is in the image, as ranges of whole blocks.
    #[must_use]
    pub fn touches(&self) -> Vec<(u64, u64)> {
        self.extents.iter().chain(&self.zero).copied().collect()
    }

    /// Reads a part of it.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, at).context("reading the image")
    }

    /// A SHA-256 over every block that is not zero, with its place.
    pub fn checksum(&self) -> Result<String> {
        use aws_lc_rs::digest::{Context, SHA256};
        let mut hash = Context::new(&SHA256);
        let mut buffer = vec![0; content::CHUNK];
        for (at, length) in content::chunks(&content::merged(self.extents.clone())) {
            self.read(at, &mut buffer[..length])?;
            for (index, block) in buffer[..length].chunks(BLOCK).enumerate() {
                if *block != ZEROS[..block.len()] {
                    hash.update(&(at + (index * BLOCK) as u64).to_le_bytes());
                    hash.update(block);
                }
            }
        }
        let digest = hash.finish();
        let mut text = String::new();
        for byte in digest.as_ref() {
            write!(text, "{byte:02x}").context("writing a checksum")?;
        }
        Ok(text)
    }
}

const ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Where a sparse file has data, in whole blocks.
fn extents(file: &File) -> Result<Vec<(u64, u64)>> {
    let block = BLOCK as u64;
    let mut extents = Vec::new();
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start / block * block,
            // No data from there on.
            Err(rustix::io::Errno::NXIO) => return Ok(content::merged(extents)),
            Err(e) => return Err(e).context("looking for data"),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start)).context("looking for holes")?;
        ensure!(end > at, "the file's holes make no sense");
        extents.push((start, end.next_multiple_of(block) - start));
        at = end;
    }
}

/// The part of [`format()`] that takes nothing but the root disk: mkfs on a new image.
/// `since` is what the time until mkfs begins is told from.
pub(super) async fn make_image(
    device: &DataDevice,
    filesystem: Filesystem,
    uuid: Uuid,
    since: Instant,
) -> Result<(Arc<Image>, Duration)> {
    let (program, package) = tool(filesystem);
    ensure!(installed(filesystem)?, "{program} is not there; install the package {package}");
    let path = image_path(&device.volumes);
    let text = path.to_str().context("a path that is not UTF-8")?;
    // An intent that is there speaks of an image that is not wanted any more.
    forget(&device.volumes)?;
    create_image(&path, filesystem, device.size())?;
    let args = arguments(filesystem, uuid, device)?;
    let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
    args.push(text);
    let after_ms = ms(since.elapsed());
    info!(control = "data-filesystem", after_ms, "{program} begins after {after_ms} ms");
    let start = Instant::now();
    let made = command::run(program, &args, MKFS_DEADLINE).await.and_then(command::Output::success);
    if let Err(e) = made {
        files::remove(&path)?;
        return Err(e.context(format!("making the filesystem in {text}")));
    }
    let size = device.size();
    let settle = move |_| {
        let image = Image::open(&path, filesystem, uuid, size)?;
        image.file.sync_all().with_context(|| format!("syncing {}", path.display()))?;
        files::sync_dir(Path::new(DIR))?;
        Ok(Arc::new(image))
    };
    let image = content::in_time(Instant::now(), MKFS_DEADLINE, settle).await?;
    Ok((image, start.elapsed()))
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Makes the directory of images, which takes its time where it has to be durable.
pub(super) fn make_room() -> Result<()> {
    files::make_directories(Path::new(DIR), 0o700)
}

/// Makes the empty sparse file, if the root disk has room for what mkfs will put into it.
fn create_image(path: &Path, filesystem: Filesystem, size: u64) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new(DIR));
    make_room()?;
    let free = nix::sys::statvfs::statvfs(dir)
        .with_context(|| format!("asking how much room there is in {}", dir.display()))?;
    let free = free.blocks_available() * free.fragment_size();
    let needed = room(filesystem, size);
    ensure!(
        free >= needed,
        "making the filesystem takes {} MiB in {}, and only {} MiB are free; make room there",
        needed >> 20,
        dir.display(),
        free >> 20
    );
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("creating {}", path.display()))?;
    file.set_len(size).with_context(|| {
        format!(
            "making {} as large as the volume ({} GiB), though sparse: the filesystem there may not \
             hold so large a file (ext4: 16 TiB)",
            path.display(),
            size >> 30
        )
    })
}

/// How many bytes mkfs takes at most in a sparse file: measured, with room to spare. ext4 writes
/// group descriptors, their copies and bitmaps (225 MiB on 15 TiB); XFS reserves its log.
fn room(filesystem: Filesystem, size: u64) -> u64 {
    const SPARE: u64 = 64 << 20;
    match filesystem {
        Filesystem::Ext4 => SPARE + size / 32_768,
        Filesystem::Xfs => SPARE + xfs_log(size).unwrap_or((64 << 20) + size / 2048),
    }
}

/// XFS's log where mkfs's own choice (1/2048 of the disk, 2 GiB at most) would take too much of the
/// root disk.
fn xfs_log(size: u64) -> Option<u64> {
    const MOST: u64 = 512 << 20;
    (size / 2048 > MOST).then_some(MOST)
}

/// The label of the filesystem that hostagent makes. XFS has room for twelve characters.
fn label(filesystem: Filesystem) -> &'static str {
    match filesystem {
        Filesystem::Ext4 => "hostagent-data",
        Filesystem::Xfs => "hostagent",
    }
}

/// What mkfs is told. The file does not tell it what the disk is like, so that is said.
fn arguments(filesystem: Filesystem, uuid: Uuid, device: &DataDevice) -> Result<Vec<String>> {
    let label = label(filesystem);
    let text = match filesystem {
        // Nothing is discarded, and the journal not zeroed: the file is all holes, and the disk's
        // part of it is proven to be zero, or made so.
        Filesystem::Ext4 => format!(
            "-q -F -b 4096 -E nodiscard,lazy_itable_init=1,lazy_journal_init=1 -L {label} -U {uuid}"
        ),
        Filesystem::Xfs => {
            let sector = block::physical_block_size(device.number())?;
            ensure!(
                matches!(sector, 512 | 1024 | 2048 | 4096),
                "the disk's sectors have {sector} bytes"
            );
            let log =
                xfs_log(device.size()).map(|log| format!(" -l size={log}")).unwrap_or_default();
            format!(
                "-q -f -K -b size=4096 -s size={sector}{log} -m crc=1,uuid={uuid} -n ftype=1 -L {label}"
            )
        }
    };
    Ok(text.split(' ').map(str::to_owned).collect())
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
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::{Cell, RefCell};
    use std::os::unix::fs::MetadataExt as _;
    use std::process::Command;

    const SIZE: u64 = 128 << 20;
    const UUID: Uuid = uuid::uuid!("f0b4e71b-1faa-5482-8fe4-ee9f5521efef");

    fn device(size: u64) -> DataDevice {
        let mut device = crate::host::device::example(block::DevNum { major: 0, minor: 0 });
        device.layer.size = size;
        device
    }

    /// What mkfs.ext4 makes with the arguments that hostagent gives it.
    fn image(dir: &Path) -> Image {
        let path = dir.join("image");
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        let made = Command::new(command::MKFS_EXT4)
            .args(arguments(Filesystem::Ext4, UUID, &device(SIZE)).unwrap())
            .arg(&path)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        Image::open(&path, Filesystem::Ext4, UUID, SIZE).unwrap()
    }

    /// A disk whose power is cut after some sectors were written: of those that were not flushed, it
    /// keeps some and loses others.
    struct Disk512 {
        file: File,
        left: Cell<u64>,
        /// What stood in the sectors that were written since the last flush.
        unflushed: RefCell<Vec<(u64, [u8; SECTOR])>>,
        written: Cell<u64>,
        /// Which unflushed sectors are lost, bit by bit.
        lost: u64,
    }

    impl Disk512 {
        fn new(path: &Path, left: u64, lost: u64) -> Self {
            let options = OpenOptions::new().read(true).write(true).open(path);
            Self {
                file: options.unwrap(),
                left: Cell::new(left),
                unflushed: RefCell::default(),
                written: Cell::new(0),
                lost,
            }
        }

        fn cut(&self) {
            for (index, (at, old)) in self.unflushed.borrow().iter().enumerate().rev() {
                if self.lost.rotate_right(u32::try_from(index % 64).unwrap()) & 1 == 1 {
                    self.file.write_all_at(old, *at).unwrap();
                }
            }
        }
    }

    impl ReadAt for &Disk512 {
        fn read_at_once(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
            self.file.read_at_once(buffer, offset)
        }
    }

    impl Device for &Disk512 {
        fn write_once(&self, bytes: &[u8], offset: u64) -> std::io::Result<usize> {
            assert!(bytes.len().is_multiple_of(BLOCK) && offset.is_multiple_of(BLOCK as u64));
            for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                if self.left.get() == 0 {
                    self.cut();
                    return Err(std::io::Error::other("the power is cut"));
                }
                self.left.set(self.left.get() - 1);
                self.written.set(self.written.get() + 1);
                let at = offset + (index * SECTOR) as u64;
                let mut old = [0; SECTOR];
                self.file.read_exact_at(&mut old, at)?;
                self.unflushed.borrow_mut().push((at, old));
                self.file.write_all_at(sector, at)?;
            }
            Ok(bytes.len())
        }

        fn flush(&self) -> std::io::Result<()> {
            self.unflushed.borrow_mut().clear();
            Ok(())
        }
    }

    fn deadline() -> std::time::Instant {
        std::time::Instant::now() + Duration::from_secs(600)
    }

    fn copy(device: &Disk512, image: &Image, onto: Onto, allowed: bool) -> Result<u64> {
        Copy { device, image, onto, allowed, size: SIZE, deadline: deadline() }.run()
    }

    /// An empty disk.
    fn blank(dir: &Path) -> PathBuf {
        let path = dir.join("disk");
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        path
    }

    fn walk(path: &Path, image: &Image) -> content::Walk {
        let mut reader = Reader::new(File::open(path).unwrap(), deadline());
        content::walk_over(&mut reader, &[(0, SIZE)], Some(image)).unwrap()
    }

    fn superblock(path: &Path) -> Option<Superblock> {
        let mut head = vec![0; superblock::HEAD];
        File::open(path).unwrap().read_exact_at(&mut head, 0).unwrap();
        Superblock::parse(&head)
    }

    /// Whether the disk is, byte by byte, what mkfs made.
    fn is_the_image(path: &Path, image: &Image) -> bool {
        let disk = File::open(path).unwrap();
        let (mut one, mut other) = (vec![0; content::CHUNK], vec![0; content::CHUNK]);
        content::chunks(&[(0, SIZE)]).all(|(at, length)| {
            disk.read_exact_at(&mut one[..length], at).unwrap();
            image.read(at, &mut other[..length]).unwrap();
            one[..length] == other[..length]
        })
    }

    fn fsck(path: &Path) {
        let checked = Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(path).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    }

    #[test]
    fn a_blank_disk_becomes_what_mkfs_made() {
        let dir = tempfile::tempdir().unwrap();
        let (image, path) = (image(dir.path()), blank(dir.path()));
        assert_eq!(image.superblock.size, SIZE);
        assert!(image.zero.iter().map(|(_, length)| length).sum::<u64>() >= 4 << 20, "a journal");
        let written = copy(&Disk512::new(&path, u64::MAX, 0), &image, Onto::Blank, false).unwrap();
        assert!(written < 4 << 20, "{written} bytes");
        assert!(is_the_image(&path, &image));
        fsck(&path);
    }

    #[test]
    fn a_large_image_has_its_journal_in_a_tree_of_extents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let size = 200 << 30;
        File::create(&path).unwrap().set_len(size).unwrap();
        let args = arguments(Filesystem::Ext4, UUID, &device(size)).unwrap();
        let made = Command::new(command::MKFS_EXT4).args(args).arg(&path).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let image = Image::open(&path, Filesystem::Ext4, UUID, size).unwrap();
        // More than the four extents that fit into the inode.
        assert!(image.zero.iter().map(|(_, length)| length).sum::<u64>() > 512 << 20);
        let taken = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(taken < room(Filesystem::Ext4, size), "{taken} bytes on the root disk");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// The power is cut anywhere in the copy: what is left is not a filesystem, and is either
        /// blank or ours and finished by writing the same again; or it is complete.
        #[test]
        fn an_interrupted_copy_is_finished(
            // Anywhere, or among the last sectors: the superblock's.
            (anywhere, before_end) in (any::<bool>(), 0_u64..12),
            share in any::<u64>(),
            lost in any::<u64>(),
            foreign in 0..SIZE,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (image, path) = (image(dir.path()), blank(dir.path()));
            let all = Disk512::new(&path, u64::MAX, 0);
            copy(&all, &image, Onto::Blank, false).unwrap();
            let path = blank(dir.path());
            let total = all.written.get();
            let left = if anywhere { share % total } else { total + 2 - before_end };
            let cut = copy(&Disk512::new(&path, left, lost), &image, Onto::Blank, false);
            if superblock(&path).is_some() {
                // Even if hostagent did not live to see it.
                prop_assert!(is_the_image(&path, &image));
                return Ok(());
            }
            prop_assert!(cut.is_err());
            let seen = walk(&path, &image);
            prop_assert_eq!(seen.foreign, None);

            // One byte of somebody else's is enough to be refused, in what is read again.
            let touched = content::merged(image.touches());
            let (at, length) = touched[usize::try_from(foreign).unwrap() % touched.len()];
            let at = at + foreign % length;
            let disk = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let mut byte = [0];
            disk.read_exact_at(&mut byte, at).unwrap();
            disk.write_all_at(&[byte[0] ^ 0x5a], at).unwrap();
            prop_assert_eq!(walk(&path, &image).foreign.map(|f| f / 512), Some(at / 512));
            for allowed in [false, true] {
                let device = Disk512::new(&path, u64::MAX, 0);
                prop_assert!(copy(&device, &image, Onto::Unfinished, allowed).is_err());
                prop_assert_eq!(device.written.get(), 0);
            }
            disk.write_all_at(&byte, at).unwrap();

            copy(&Disk512::new(&path, u64::MAX, 0), &image, Onto::Unfinished, false).unwrap();
            prop_assert!(is_the_image(&path, &image));
            fsck(&path);
        }
    }

    #[test]
    fn copies_of_the_superblock_are_where_they_are_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        for size in [1 << 30, 8 << 30] {
            File::create(&path).unwrap().set_len(size).unwrap();
            let args = arguments(Filesystem::Ext4, UUID, &device(size)).unwrap();
            let made = Command::new(command::MKFS_EXT4).args(args).arg(&path).output().unwrap();
            assert!(made.status.success(), "{made:?}");
            let file = File::open(&path).unwrap();
            let mut found = 0;
            for at in superblock::copies(size) {
                let mut block = vec![0; BLOCK];
                file.read_exact_at(&mut block, at).unwrap();
                found += u32::from(Superblock::copy(&block).is_some_and(|sb| sb.uuid == UUID));
            }
            assert_eq!(found, 3, "{size}");
        }
    }

    #[test]
    fn data_where_the_filesystem_would_be_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (image, path) = (image(dir.path()), blank(dir.path()));
        let (journal, _) = image.zero[0];
        let disk = OpenOptions::new().write(true).open(&path).unwrap();
        disk.write_all_at(b"x", journal + 12_345).unwrap();
        let device = Disk512::new(&path, u64::MAX, 0);
        let refused = copy(&device, &image, Onto::Blank, false).unwrap_err().to_string();
        assert!(refused.contains(&format!("data at byte {}", journal + 12_345)), "{refused}");
        assert!(refused.contains("volume.format_unrecognised"), "{refused}");
        assert_eq!(device.written.get(), 0);
        // Allowed, it is gone.
        copy(&device, &image, Onto::Blank, true).unwrap();
        assert!(is_the_image(&path, &image));
    }

    #[test]
    fn over_unrecognised_content_the_journal_and_the_ends_are_zero() {
        let dir = tempfile::tempdir().unwrap();
        let (image, path) = (image(dir.path()), blank(dir.path()));
        let disk = OpenOptions::new().write(true).open(&path).unwrap();
        let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
        let mut mebibyte = vec![0; 1 << 20];
        for word in mebibyte.chunks_exact_mut(8) {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            word.copy_from_slice(&noise.to_le_bytes());
        }
        for at in (0..SIZE).step_by(1 << 20) {
            disk.write_all_at(&mebibyte, at).unwrap();
        }
        copy(&Disk512::new(&path, u64::MAX, 0), &image, Onto::Unrecognised, true).unwrap();
        fsck(&path);
        let mut reader = Reader::new(File::open(&path).unwrap(), deadline());
        let zero = content::walk_over(&mut reader, &image.zero, Some(&image)).unwrap();
        assert_eq!(zero.foreign, None, "the journal");
        let ends = content::walk_over(&mut reader, &content::ends(SIZE), Some(&image)).unwrap();
        assert_eq!(ends.foreign, None, "the ends");
    }

    #[test]
    fn a_damaged_image_has_another_checksum() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        let before = image.checksum().unwrap();
        assert_eq!(image.checksum().unwrap(), before);
        let path = dir.path().join("image");
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let (at, _) = image.extents[image.extents.len() - 1];
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let damaged = Image::open(&path, Filesystem::Ext4, UUID, SIZE).unwrap();
        assert_ne!(damaged.checksum().unwrap(), before);
    }

    #[test]
    fn an_image_of_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(image(dir.path()));
        let path = dir.path().join("image");
        let open = |kind, uuid, size| Image::open(&path, kind, uuid, size).map(drop);
        assert!(open(Filesystem::Ext4, UUID, SIZE).is_ok());
        assert!(open(Filesystem::Xfs, UUID, SIZE).is_err());
        assert!(open(Filesystem::Ext4, Uuid::nil(), SIZE).is_err());
        assert!(open(Filesystem::Ext4, UUID, SIZE + 4096).is_err());
    }

    #[test]
    fn the_step_goes_on_only_over_what_the_plan_saw() {
        let order = |onto, allowed| Order {
            volumes: device(SIZE).volumes,
            filesystem: Filesystem::Ext4,
            uuid: UUID,
            onto,
            allowed,
            instance_id: "i-0123456789abcdef0".into(),
        };
        let blank = Content::Blank { read: 1 };
        let unfinished = Content::Unfinished { written: 1 };
        let unrecognised = Content::Unrecognised { offset: 1 };
        let signature = Content::Signature { name: "gpt".into(), uuid: None, label: None };
        let contradiction = Content::Contradiction { blkid: "x".into(), own: "y".into() };
        let contents = [blank, unfinished, unrecognised, signature, contradiction];
        let seen = |content| Inspection {
            content,
            blkid: None,
            own: Vec::new(),
            regions: 1,
            bytes: 1,
            milliseconds: 1,
            copy: None,
            entry_types: None,
        };
        let allowed = |onto, allowed| {
            contents.clone().map(|c| still(&order(onto, allowed), &seen(c), false).is_ok())
        };
        for named in [false, true] {
            assert_eq!(allowed(Onto::Blank, named), [true, false, false, false, false]);
            assert_eq!(allowed(Onto::Unfinished, named), [true, true, false, false, false]);
        }
        assert_eq!(allowed(Onto::Unrecognised, true), [false, false, true, false, false]);
        assert_eq!(allowed(Onto::Unrecognised, false), [false; 5]);
        // What is left of hostagent's own filesystem is not destroyed, unless it was never complete.
        let copy = |uuid: Uuid| content::Found {
            name: "ext4".into(),
            at: 1 << 27,
            uuid: Some(uuid.to_string()),
        };
        let order = order(Onto::Unrecognised, true);
        let left = |uuid| Inspection {
            copy: Some(copy(uuid)),
            ..seen(Content::Unrecognised { offset: 1 })
        };
        assert!(still(&order, &left(UUID), false).is_err());
        assert!(still(&order, &left(UUID), true).is_ok());
        assert!(still(&order, &left(Uuid::nil()), false).is_ok());
    }
}
