//! What is on a disk: blank, a filesystem or something else that is recognised, a format of ours
//! that was interrupted, or bytes that nothing recognises. Nothing here writes.
//!
//! Blankness is proven by content: everything in which a signature, a backup superblock or a second
//! header can be, and samples of the rest, is read with direct I/O and must be zero, and two separate
//! probes (blkid(8) and [`super::signatures`]) must find nothing. An error, a short read or a disk
//! that does not answer in time is an error here, and never "nothing there".
//!
//! Which disk is meant is [`super::block`]'s business; what follows from its content is decided in
//! the controls.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout_at};

use super::command;
use super::device::DataDevice;
use super::format::Image;
use super::signatures;
pub use super::signatures::Found;
use super::superblock::{self, HEAD, Superblock};

/// What is on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Content {
    /// Every region that was read holds zeros only, and no probe finds anything.
    Blank {
        /// How many bytes were read.
        read: u64,
    },
    /// A part of the filesystem that hostagent began to write, and nothing else: every sector that
    /// was read is zero or that of the image, and no probe finds anything.
    Unfinished {
        /// How many bytes of the image are there.
        written: u64,
    },
    /// A filesystem, partition table or other signature.
    Signature {
        /// Its type as blkid(8) names it, such as `ext4`, `LVM2_member`, `gpt`.
        name: String,
        /// Its UUID.
        uuid: Option<String>,
        /// Its label.
        label: Option<String>,
    },
    /// The two probes do not agree, also when asked again.
    Contradiction {
        /// What blkid(8) finds.
        blkid: String,
        /// What the probe in [`super::signatures`] finds.
        own: String,
    },
    /// Bytes that are not zero and that nothing recognises.
    Unrecognised {
        /// Where the first of them is.
        offset: u64,
    },
}

/// What was found on a disk, and how it was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// What is there.
    #[serde(flatten)]
    pub content: Content,
    /// What `blkid -p` answered; none for nothing.
    pub blkid: Option<String>,
    /// What the second probe found.
    pub own: Vec<Found>,
    /// How many separate regions were read for zeros.
    pub regions: usize,
    /// How many bytes were read.
    pub bytes: u64,
    /// How long all of it took, in milliseconds.
    pub milliseconds: u64,
    /// Where nothing is recognised: a copy of the superblock of ext4 or XFS.
    pub copy: Option<Found>,
    /// Whether a filesystem that is there keeps the types of directory entries (XFS: `ftype`).
    pub entry_types: Option<bool>,
}

impl Inspection {
    /// A copy of the superblock of the filesystem with this UUID, on a disk on which nothing is
    /// recognised: what is left of a filesystem that was complete, unless its format was interrupted.
    #[must_use]
    pub fn remnant_of(&self, uuid: uuid::Uuid) -> Option<&Found> {
        self.copy.as_ref().filter(|copy| copy.uuid == Some(uuid.to_string()))
    }
}

/// How often the probes are asked when they contradict each other, and how long is waited between: a
/// superblock that is read while it is written looks damaged for a moment.
const TRIES: u32 = 3;
const BETWEEN: Duration = Duration::from_millis(200);

/// The longest that blkid may take, which reads a few blocks.
const BLKID_DEADLINE: Duration = Duration::from_secs(60);

/// How long a disk may take to be opened, of which nothing is read for that.
const OPEN: Duration = Duration::from_secs(30);

/// How long a read that hangs is waited for beyond the limit, which is checked between reads.
const GRACE: Duration = Duration::from_secs(5);

/// Looks at what is on a disk, within `limit`. With the image of a format that may have been
/// interrupted, the disk is also compared with that.
pub async fn inspect(
    device: &DataDevice,
    image: Option<Arc<Image>>,
    limit: Duration,
) -> Result<Inspection> {
    let opened = device.clone();
    let open = move |_| {
        let direct = nix::libc::O_DIRECT;
        opened.open(OpenOptions::new().read(true).custom_flags(direct))
    };
    // It waits for whoever closes the disk at this moment, who may wait for the disk.
    let file = in_time(Instant::now(), limit.min(OPEN), open).await?;
    inspect_opened(&file, device, image, limit).await
}

/// As [`inspect`], through a descriptor that was opened for direct I/O.
pub async fn inspect_opened(
    file: &File,
    device: &DataDevice,
    image: Option<Arc<Image>>,
    limit: Duration,
) -> Result<Inspection> {
    let (began, path, size) = (Instant::now(), device.path(), device.size());
    let mut tries = 1;
    loop {
        let told = blkid(&path, limit).await?;
        let file = file.try_clone().context("duplicating a descriptor")?;
        let (image, recognised) = (image.clone(), told.is_some());
        let reading = in_time(began, limit, move |deadline| {
            look(file, size, recognised, image.as_deref(), deadline)
        });
        let seen = reading.await.with_context(|| format!("reading {}", path.display()))?;
        let content = combine(told.clone(), &seen);
        if matches!(content, Content::Contradiction { .. }) && tries < TRIES {
            tries += 1;
            sleep(BETWEEN).await;
            continue;
        }
        return Ok(Inspection {
            content,
            blkid: told.map(|signature| signature.name),
            own: seen.own,
            regions: seen.walk.as_ref().map_or(0, |walk| walk.regions),
            bytes: seen.bytes,
            milliseconds: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            copy: seen.copy,
            entry_types: seen.entry_types,
        });
    }
}

/// Runs what reads or writes a disk in a thread of its own, which is left behind when the disk
/// hangs; it is given the moment after which it must not begin another read or write.
pub async fn in_time<T: Send + 'static>(
    began: Instant,
    limit: Duration,
    work: impl FnOnce(std::time::Instant) -> Result<T> + Send + 'static,
) -> Result<T> {
    let deadline = began + limit;
    let thread = tokio::task::spawn_blocking(move || work(deadline.into_std()));
    match timeout_at(deadline + GRACE, thread).await {
        Ok(done) => done.context("the thread that uses the disk")?,
        Err(_) => bail!("the disk did not answer within {} s", limit.as_secs()),
    }
}

/// What blkid found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Signature {
    name: String,
    uuid: Option<String>,
    label: Option<String>,
}

/// What was seen by reading.
#[derive(Debug)]
struct Seen {
    own: Vec<Found>,
    /// Absent where a probe has found something.
    walk: Option<Walk>,
    bytes: u64,
    copy: Option<Found>,
    entry_types: Option<bool>,
}

fn look(
    file: File,
    size: u64,
    recognised: bool,
    image: Option<&Image>,
    deadline: std::time::Instant,
) -> Result<Seen> {
    ensure!(size >= 64 * MIB, "the disk has {size} bytes; no EBS volume is that small");
    ensure!(
        size.is_multiple_of(BLOCK as u64),
        "the disk's size is {size} bytes, no multiple of {BLOCK}"
    );
    let mut reader = Reader::new(file, deadline);
    let mut head = vec![0; HEAD];
    reader.read(0, &mut head)?;
    let entry_types = Superblock::parse(&head).map(|sb| sb.ftype);
    let own = if recognised {
        signatures::filesystem(|at, bytes| reader.read(at, bytes))?
    } else {
        signatures::scan(size, |at, bytes| reader.read(at, bytes))?
    };
    let mut walk = None;
    if !recognised && own.is_empty() {
        let mut ranges = regions(size);
        if let Some(image) = image {
            ranges.extend(image.touches());
        }
        walk = Some(walk_over(&mut reader, &merged(ranges), image)?);
    }
    let mut copy = None;
    if walk.as_ref().is_some_and(|walk| walk.foreign.is_some()) {
        let mut block = vec![0; HEAD];
        for at in superblock::copies(size) {
            reader.read(at, &mut block)?;
            copy = copy.or_else(|| {
                let found = Superblock::copy(&block)?;
                Some(Found { name: found.kind.into(), at, uuid: Some(found.uuid.to_string()) })
            });
        }
    }
    Ok(Seen { own, walk, bytes: reader.bytes, copy, entry_types })
}

/// What the answers mean together.
fn combine(told: Option<Signature>, seen: &Seen) -> Content {
    let own = |found: &Found| format!("{} at byte {}", found.name, found.at);
    let all = || seen.own.iter().map(own).collect::<Vec<_>>().join(", ");
    let Some(Signature { name, uuid, label }) = told else {
        return match &seen.walk {
            None => Content::Contradiction { blkid: "nothing".into(), own: all() },
            Some(Walk { foreign: Some(offset), .. }) => Content::Unrecognised { offset: *offset },
            Some(Walk { same: 0, read, .. }) => Content::Blank { read: *read },
            Some(Walk { same, .. }) => Content::Unfinished { written: *same },
        };
    };
    // What the second probe can tell apart, it must have seen too, with the same UUID.
    let family = match name.as_str() {
        "ext2" | "ext3" | "ext4" => Some("ext4"),
        "xfs" => Some("xfs"),
        _ => None,
    };
    let agrees = family.is_none_or(|f| seen.own.iter().any(|o| o.name == f && o.uuid == uuid));
    if agrees {
        return Content::Signature { name, uuid, label };
    }
    let blkid = format!("{name}{}", uuid.map(|uuid| format!(" {uuid}")).unwrap_or_default());
    let own = if seen.own.is_empty() { "neither ext4 nor xfs".to_owned() } else { all() };
    Content::Contradiction { blkid, own }
}

/// What `blkid -p` finds. Its exit status 2 means "nothing found" and also "could not read", so an
/// answer of "nothing" proves nothing by itself (util-linux, kubernetes#142243).
async fn blkid(path: &Path, limit: Duration) -> Result<Option<Signature>> {
    let path = path.to_string_lossy();
    let args = ["-p", "-o", "export", &path];
    let output = command::run(command::BLKID, &args, limit.min(BLKID_DEADLINE)).await?;
    match output.code {
        Some(2) => Ok(None),
        Some(0) => Ok(Some(parse_blkid(&output.stdout))),
        // 8: several signatures contradict each other.
        Some(8) => Ok(Some(Signature {
            name: "several signatures that contradict each other".into(),
            uuid: None,
            label: None,
        })),
        _ => Err(output.error()),
    }
}

fn parse_blkid(stdout: &str) -> Signature {
    let get = |key: &str| {
        stdout.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
    };
    let name = get("TYPE").or_else(|| get("PTTYPE")).unwrap_or_else(|| "something unnamed".into());
    Signature { name, uuid: get("UUID"), label: get("LABEL") }
}

/// The size of direct reads and writes, and what their offsets are multiples of.
pub const BLOCK: usize = 4096;
/// The most that is read or written in one go.
pub const CHUNK: usize = 1 << 20;
/// What a disk writes whole or not at all.
pub const SECTOR: usize = 512;
const MIB: u64 = 1 << 20;

/// One positioned read, so that tests can read from something that fails.
pub trait ReadAt {
    /// As [`std::os::unix::fs::FileExt::read_at`].
    fn read_at_once(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize>;
}

impl ReadAt for File {
    fn read_at_once(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        loop {
            match self.read_at(buffer, offset) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// A buffer of [`CHUNK`] bytes whose address is a multiple of [`BLOCK`], as direct I/O needs it.
pub struct Buffer {
    bytes: Vec<u8>,
    skew: usize,
}

impl Buffer {
    /// Of zeros.
    #[must_use]
    pub fn new() -> Self {
        let bytes = vec![0; CHUNK + BLOCK];
        let skew = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, skew }
    }

    /// Its first `length` bytes.
    pub fn first(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.skew..self.skew + length]
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads a disk block by block, until a deadline.
pub struct Reader<F> {
    file: F,
    buffer: Buffer,
    deadline: std::time::Instant,
    /// How many bytes were read.
    pub bytes: u64,
}

impl<F: ReadAt> Reader<F> {
    /// Of an opened disk.
    pub fn new(file: F, deadline: std::time::Instant) -> Self {
        Self { file, buffer: Buffer::new(), deadline, bytes: 0 }
    }

    /// Reads whole blocks, at most [`CHUNK`] bytes of them.
    pub fn chunk(&mut self, at: u64, length: usize) -> Result<&[u8]> {
        ensure!(std::time::Instant::now() < self.deadline, "at byte {at}: reading takes too long");
        let part = self.buffer.first(length);
        let got = self.file.read_at_once(part, at).with_context(|| format!("at byte {at}"))?;
        ensure!(got == length, "at byte {at}: {got} bytes were read instead of {length}");
        self.bytes += length as u64;
        Ok(part)
    }

    /// Fills `bytes`, which is whole blocks.
    pub fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<()> {
        for (index, part) in bytes.chunks_mut(CHUNK).enumerate() {
            let read = self.chunk(at + (index * CHUNK) as u64, part.len())?;
            part.copy_from_slice(read);
        }
        Ok(())
    }
}

/// What was seen in some ranges of a disk.
#[derive(Debug, PartialEq, Eq)]
pub struct Walk {
    /// The first byte that is neither zero nor the image's.
    pub foreign: Option<u64>,
    /// How many bytes were read.
    pub read: u64,
    /// How many bytes are in sectors of the image that are there.
    pub same: u64,
    /// How many ranges there were.
    pub regions: usize,
}

/// Reads ranges up to the first sector that is neither zero nor, if there is an image, the image's.
pub fn walk_over(
    reader: &mut Reader<impl ReadAt>,
    ranges: &[(u64, u64)],
    image: Option<&Image>,
) -> Result<Walk> {
    let zeros = vec![0_u8; CHUNK];
    let mut expected = vec![0_u8; if image.is_some() { CHUNK } else { 0 }];
    let mut walk = Walk { foreign: None, read: 0, same: 0, regions: ranges.len() };
    for (at, length) in chunks(ranges) {
        let seen = reader.chunk(at, length)?;
        walk.read += length as u64;
        // Compared as a whole first: nearly all of it is zeros.
        if *seen == zeros[..length] {
            continue;
        }
        if let Some(image) = image {
            image.read(at, &mut expected[..length])?;
        }
        for (index, sector) in seen.chunks(SECTOR).enumerate() {
            if *sector == zeros[..sector.len()] {
                continue;
            }
            let start = index * SECTOR;
            if image.is_some() && *sector == expected[start..start + sector.len()] {
                walk.same += sector.len() as u64;
                continue;
            }
            let wrong = |i: &usize| sector[*i] != 0 && Some(&sector[*i]) != expected.get(start + i);
            let byte = (0..sector.len()).find(wrong).unwrap_or(0);
            walk.foreign = Some(at + (start + byte) as u64);
            return Ok(walk);
        }
    }
    Ok(walk)
}

/// Ranges in pieces of at most [`CHUNK`] bytes.
pub fn chunks(ranges: &[(u64, u64)]) -> impl Iterator<Item = (u64, usize)> {
    ranges.iter().flat_map(|(at, length)| {
        (0..length.div_ceil(CHUNK as u64)).map(move |i| {
            let offset = i * CHUNK as u64;
            // No more than a chunk.
            #[allow(clippy::cast_possible_truncation)]
            let piece = (length - offset).min(CHUNK as u64) as usize;
            (at + offset, piece)
        })
    })
}

/// Sorts ranges and joins those that touch or overlap.
#[must_use]
pub fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (at, length) in ranges {
        match joined.last_mut() {
            Some((start, before)) if at <= *start + *before => {
                *before = (*before).max(at + length - *start);
            }
            _ => joined.push((at, length)),
        }
    }
    joined
}

/// The two ends of a disk, where most signatures are.
#[must_use]
pub fn ends(size: u64) -> [(u64, u64); 2] {
    // The head holds nearly all signatures, LUKS2's second header (at most at 4 MiB) and LVM's
    // metadata; the tail holds GPT's second table, md 0.9 and 1.0, ZFS's labels 2 and 3, DDF.
    [(0, 8 * MIB), (size - 8 * MIB, 8 * MIB)]
}

/// The regions to read, as offset and length; multiples of [`BLOCK`], within `size`, which is at
/// least 64 MiB and a multiple of [`BLOCK`] itself.
fn regions(size: u64) -> Vec<(u64, u64)> {
    let block = BLOCK as u64;
    let mut regions = ends(size).to_vec();
    // The backup superblocks of ext2/3/4 with `sparse_super`: groups 1 and powers of 3, 5 and 7.
    for (blocksize, first) in [(1024_u64, 1024_u64), (2048, 0), (4096, 0)] {
        let group_bytes = blocksize * 8 * blocksize;
        for base in [3_u64, 5, 7] {
            let mut group = 1_u64;
            while let Some(at) = group.checked_mul(group_bytes).map(|at| at + first)
                && at < size
            {
                regions.push((at, 2 * block));
                group *= base;
            }
        }
    }
    // btrfs mirrors its superblock at 64 MiB and 256 GiB.
    regions.extend([(64 * MIB, block), (256 * 1024 * MIB, block)]);
    // XFS begins each allocation group with a superblock; mkfs makes four by default, and a
    // partition may begin anywhere: evenly spread samples, quarters among them.
    let samples = 1024;
    regions.extend((0..samples).map(|i| (size / samples * i, 2 * block)));
    regions
        .into_iter()
        .map(|(at, length)| (at / block * block, length))
        .filter(|(at, length)| at + length <= size)
        .collect()
}

#[cfg(test)]
mod tests;
