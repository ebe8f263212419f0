//! The image of a filesystem: the sparse file on the root disk in which mkfs makes it. Nothing here
//! touches the disk that the filesystem is for.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::SeekFrom;
use tokio::time::Instant;
use tracing::info;
use uuid::Uuid;

use super::{DIR, MKFS_DEADLINE, forget, image_path, installed, ms, tool};
use crate::config::Filesystem;
use crate::host::block;
use crate::host::content::{self, BLOCK};
use crate::host::device::DataDevice;
use crate::host::superblock::{self, Superblock};
use crate::host::{command, files};

/// A filesystem in a sparse file, as mkfs made it.
#[derive(Debug)]
pub struct Image {
    file: File,
    pub(super) superblock: Superblock,
    /// Where the file has data, in whole blocks.
    pub(super) extents: Vec<(u64, u64)>,
    /// What the filesystem takes to be zero beside it.
    pub(super) zero: Vec<(u64, u64)>,
}

impl Image {
    pub(super) fn open(path: &Path, filesystem: Filesystem, uuid: Uuid, size: u64) -> Result<Self> {
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

pub(super) const ZEROS: [u8; BLOCK] = [0; BLOCK];

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
pub(in crate::host) async fn make_image(
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

/// Makes the directory of images, which takes its time where it has to be durable.
pub(in crate::host) fn make_room() -> Result<()> {
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
pub(super) fn room(filesystem: Filesystem, size: u64) -> u64 {
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
pub(super) fn arguments(
    filesystem: Filesystem,
    uuid: Uuid,
    device: &DataDevice,
) -> Result<Vec<String>> {
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
