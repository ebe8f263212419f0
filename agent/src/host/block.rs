//! Block devices: which disks the kernel has, which EBS volume each is, who uses them, and what is
//! on them. Nothing here writes to a disk.
//!
//! A disk is identified by its serial number and never by its name: on Nitro the serial of an EBS
//! disk is the volume id without its dash (EC2 User Guide, "EBS volumes and NVMe"); kernel names
//! depend on the order in which devices answer and change between boots.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{command, mounts};

/// The model of instance-store disks, which are never a data volume.
const INSTANCE_STORE: &str = "Amazon EC2 NVMe Instance Storage";

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DevNum {
    /// The driver.
    pub major: u32,
    /// The device of that driver.
    pub minor: u32,
}

impl DevNum {
    /// From a `dev_t`, as in `stat(2)`.
    #[must_use]
    pub fn of(dev: u64) -> Self {
        let part = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Self { major: part(nix::sys::stat::major(dev)), minor: part(nix::sys::stat::minor(dev)) }
    }

    /// As a `dev_t`.
    #[must_use]
    pub fn raw(self) -> u64 {
        nix::sys::stat::makedev(self.major.into(), self.minor.into())
    }

    /// From `MAJOR:MINOR`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl fmt::Display for DevNum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl Serialize for DevNum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DevNum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("not MAJOR:MINOR"))
    }
}

/// The namespace of the UUIDs that follow from volume ids; drawn once.
const NAMESPACE: uuid::Uuid = uuid::uuid!("9f2b1c54-0d0e-4d53-9d39-1a8c0c1f6c11");

/// The id of an EBS volume, `vol-` and 8 or 17 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(String);

impl VolumeId {
    /// From EC2's spelling.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        text.strip_prefix("vol-").filter(|s| is_resource_suffix(s)).map(|_| Self(text.to_owned()))
    }

    /// From a disk's serial number, which has no dash.
    #[must_use]
    pub fn from_serial(serial: &str) -> Option<Self> {
        let rest = serial.trim().strip_prefix("vol")?;
        Self::parse(&format!("vol-{}", rest.strip_prefix('-').unwrap_or(rest)))
    }

    /// EC2's spelling.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The UUID of the filesystem that hostagent makes on this volume. It follows from the volume's
    /// id (RFC 9562, version 5), so that whether a filesystem is ours can be told from the disk
    /// alone, and a copy of it on another volume is not.
    #[must_use]
    pub fn filesystem_uuid(&self) -> uuid::Uuid {
        uuid::Uuid::new_v5(&NAMESPACE, self.0.as_bytes())
    }
}

impl TryFrom<String> for VolumeId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is not a volume id"))
    }
}

impl From<VolumeId> for String {
    fn from(id: VolumeId) -> Self {
        id.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The volumes that carry one filesystem: one, or several beneath LVM or md. Sorted, each once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<VolumeId>", into = "Vec<VolumeId>")]
pub struct Volumes(Vec<VolumeId>);

impl Volumes {
    /// The volumes' ids in order.
    #[must_use]
    pub fn ids(&self) -> &[VolumeId] {
        &self.0
    }

    /// The UUID of the filesystem that hostagent makes on them, see [`VolumeId::filesystem_uuid`].
    #[must_use]
    pub fn filesystem_uuid(&self) -> uuid::Uuid {
        let ids: Vec<&str> = self.0.iter().map(VolumeId::as_str).collect();
        uuid::Uuid::new_v5(&NAMESPACE, ids.join(",").as_bytes())
    }
}

impl From<Vec<VolumeId>> for Volumes {
    fn from(mut ids: Vec<VolumeId>) -> Self {
        ids.sort();
        ids.dedup();
        Self(ids)
    }
}

impl From<VolumeId> for Volumes {
    fn from(id: VolumeId) -> Self {
        Self(vec![id])
    }
}

impl From<Volumes> for Vec<VolumeId> {
    fn from(volumes: Volumes) -> Self {
        volumes.0
    }
}

impl fmt::Display for Volumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<&str> = self.0.iter().map(VolumeId::as_str).collect();
        f.write_str(&ids.join(" and "))
    }
}

/// Whether a text is what follows the dash of an EC2 resource id.
#[must_use]
pub fn is_resource_suffix(text: &str) -> bool {
    let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    matches!(text.len(), 8 | 17) && text.chars().all(hex)
}

/// A whole disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The kernel's name at this moment.
    pub name: String,
    /// Its device number.
    pub number: DevNum,
    /// The serial number the disk reports.
    pub serial: Option<String>,
    /// The model the disk reports.
    pub model: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// How its volume is told.
    #[serde(default)]
    pub told_by: ToldBy,
}

/// How the volume of a disk is told.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToldBy {
    /// By its serial number.
    #[default]
    Serial,
    /// By the kernel's name, which on Xen follows from the name in EC2's block device mapping (EC2
    /// User Guide, "Device names for volumes"): the volume, once EC2's mapping was looked at.
    Mapping(Option<VolumeId>),
}

impl Disk {
    /// The EBS volume this disk is, if its serial number or EC2's mapping says so and it is no
    /// instance store.
    #[must_use]
    pub fn volume_id(&self) -> Option<VolumeId> {
        if let ToldBy::Mapping(volume) = &self.told_by {
            return volume.clone();
        }
        if self.model.as_deref() == Some(INSTANCE_STORE) {
            return None;
        }
        VolumeId::from_serial(self.serial.as_deref()?)
    }

    /// Its device file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }
}

/// The first of these attributes of a sysfs directory that is there and not empty.
pub(super) fn attribute(dir: &Path, names: &[&str]) -> Result<Option<String>> {
    for name in names {
        let path = dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => return Ok(Some(text.trim().to_owned()).filter(|t| !t.is_empty())),
            // ENODEV: the device went away between the listing and the reading.
            Err(e)
                if e.kind() == ErrorKind::NotFound
                    || e.raw_os_error() == Some(nix::libc::ENODEV) => {}
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        }
    }
    Ok(None)
}

/// All whole disks that are hardware: no loop devices, no device mapper, and none that the kernel
/// hides (the per-path nodes of multipath NVMe carry the volume's serial but have no device file).
pub fn disks() -> Result<Vec<Disk>> {
    disks_under(Path::new("/sys/block"))
}

fn disks_under(sys_block: &Path) -> Result<Vec<Disk>> {
    let doing = || format!("listing {}", sys_block.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(sys_block).with_context(doing)? {
        let dir = entry.with_context(doing)?.path();
        if !dir.join("device").exists() || attribute(&dir, &["hidden"])?.as_deref() == Some("1") {
            continue;
        }
        found.extend(disk_in(&dir)?);
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The disk whose sysfs directory this is; none if it went away meanwhile.
pub(super) fn disk_in(dir: &Path) -> Result<Option<Disk>> {
    let number = attribute(dir, &["dev"])?.as_deref().and_then(DevNum::parse);
    // `size` counts 512-byte sectors whatever the disk's own sector size is.
    let (Some(number), Some(sectors)) = (number, attribute(dir, &["size"])?) else {
        return Ok(None);
    };
    let sectors: u64 =
        sectors.parse().with_context(|| format!("reading {}/size", dir.display()))?;
    // Xen's block devices name their kind on the Xen bus, and have no serial number.
    let xen = attribute(dir, &["device/devtype"])?.as_deref() == Some("vbd");
    Ok(Some(Disk {
        name: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        number,
        // NVMe has it below `device`, virtio beside it.
        serial: attribute(dir, &["device/serial", "serial"])?,
        model: attribute(dir, &["device/model"])?,
        size: sectors * 512,
        told_by: if xen { ToldBy::Mapping(None) } else { ToldBy::Serial },
    }))
}

/// The whole disk with this device number.
pub fn disk_by_number(number: DevNum) -> Result<Option<Disk>> {
    Ok(disks()?.into_iter().find(|disk| disk.number == number))
}

/// The one disk that is this volume. Two disks with one serial number are an error: then the serial
/// does not tell which is meant.
pub fn disk_of_volume(volume: &VolumeId) -> Result<Option<Disk>> {
    let mut found: Vec<Disk> =
        disks()?.into_iter().filter(|disk| disk.volume_id().as_ref() == Some(volume)).collect();
    if found.len() > 1 {
        let names: Vec<&str> = found.iter().map(|disk| disk.name.as_str()).collect();
        bail!("{} disks have the serial number of {volume}: {}", found.len(), names.join(", "));
    }
    Ok(found.pop())
}

/// Who uses a disk: partitions, device mapper and md above it, mounts, swap. Empty means nobody.
pub fn users(disk: &Disk) -> Result<Vec<String>> {
    let dir = Path::new("/sys/block").join(&disk.name);
    let mut users = Vec::new();
    let mut numbers = vec![disk.number];
    for entry in fs::read_dir(&dir).with_context(|| format!("listing {}", dir.display()))? {
        let path = entry.with_context(|| format!("listing {}", dir.display()))?.path();
        if path.join("partition").exists() {
            users.push(format!(
                "partition {}",
                path.file_name().unwrap_or_default().to_string_lossy()
            ));
            numbers.extend(attribute(&path, &["dev"])?.as_deref().and_then(DevNum::parse));
            users.extend(holders(&path)?);
        }
    }
    users.extend(holders(&dir)?);
    for mount in mounts::all()? {
        if numbers.contains(&mount.device) {
            users.push(format!("mounted on {}", mount.mount_point));
        }
    }
    let swaps = fs::read_to_string("/proc/swaps").context("reading /proc/swaps")?;
    for line in swaps.lines().skip(1) {
        let Some(file) = line.split_whitespace().next() else { continue };
        let meta = fs::metadata(file).with_context(|| format!("looking at the swap {file}"))?;
        let number = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
        if numbers.contains(&DevNum::of(number)) {
            users.push(format!("swap {file}"));
        }
    }
    Ok(users)
}

fn holders(dir: &Path) -> Result<Vec<String>> {
    let path = dir.join("holders");
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).with_context(|| format!("listing {}", path.display()))? {
        let entry = entry.with_context(|| format!("listing {}", path.display()))?;
        names.push(format!("held by {}", entry.file_name().to_string_lossy()));
    }
    Ok(names)
}

/// What is on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Content {
    /// Every region that was read holds zeros only, and blkid(8) finds nothing.
    Blank {
        /// How many bytes were read.
        read: u64,
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
    /// Bytes that are not zero and that nothing recognises.
    Unrecognised {
        /// Where the first of them is.
        offset: u64,
    },
}

/// Looks at what is on a disk. Any error in reading is an error, never "nothing there".
pub async fn content(disk: &Disk) -> Result<Content> {
    let path = disk.path();
    let file = open_checked(disk, OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT))?;
    if let Some(signature) = blkid(&path).await? {
        return Ok(signature);
    }
    let size = disk.size;
    let first = tokio::task::spawn_blocking(move || first_nonzero(&file, size))
        .await
        .context("reading the disk")?
        .with_context(|| format!("reading {}", path.display()))?;
    Ok(match first {
        Scan { nonzero: Some(offset), .. } => Content::Unrecognised { offset },
        Scan { nonzero: None, read } => Content::Blank { read },
    })
}

/// Opens a disk's device file and proves, by the opened descriptor, that it is that disk.
pub fn open_checked(disk: &Disk, options: &OpenOptions) -> Result<File> {
    let path = disk.path();
    let file = options.open(&path).with_context(|| format!("opening {}", path.display()))?;
    let meta = file.metadata().with_context(|| format!("looking at {}", path.display()))?;
    if !meta.file_type().is_block_device() || DevNum::of(meta.rdev()) != disk.number {
        bail!("{} is not the block device {}", path.display(), disk.number);
    }
    // By number, not by name: this is what the kernel says of the device that is now open.
    let dir = PathBuf::from(format!("/sys/dev/block/{}", disk.number));
    let serial = attribute(&dir, &["device/serial", "serial"])?;
    if serial != disk.serial {
        bail!("{} has the serial number {serial:?}, not {:?}", path.display(), disk.serial);
    }
    Ok(file)
}

/// What `blkid -p` finds. Its exit status 2 means "nothing found" and also "could not read", so an
/// answer of "nothing" proves nothing by itself (util-linux, kubernetes#142243).
async fn blkid(path: &Path) -> Result<Option<Content>> {
    let path = path.to_string_lossy();
    let args = ["-p", "-o", "export", &path];
    let output = command::run(command::BLKID, &args, Duration::from_secs(60)).await?;
    match output.code {
        Some(2) => Ok(None),
        Some(0) => Ok(Some(parse_blkid(&output.stdout))),
        // 8: several signatures contradict each other.
        Some(8) => Ok(Some(Content::Signature {
            name: "several signatures that contradict each other".into(),
            uuid: None,
            label: None,
        })),
        _ => Err(output.error()),
    }
}

fn parse_blkid(stdout: &str) -> Content {
    let get = |key: &str| {
        stdout.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
    };
    let name = get("TYPE").or_else(|| get("PTTYPE")).unwrap_or_else(|| "something unnamed".into());
    Content::Signature { name, uuid: get("UUID"), label: get("LABEL") }
}

/// The size of direct reads, and what offsets are multiples of.
const BLOCK: usize = 4096;
const CHUNK: usize = 1 << 20;
const MIB: u64 = 1 << 20;

struct Scan {
    nonzero: Option<u64>,
    read: u64,
}

/// Reads every region in which a signature, a backup superblock or a second header can be, and
/// samples of the rest, and tells where the first byte is that is not zero.
fn first_nonzero(file: &impl ReadAt, size: u64) -> Result<Scan> {
    if size < 64 * MIB {
        bail!("the disk has {size} bytes; no EBS volume is that small");
    }
    let zeros = vec![0_u8; CHUNK];
    let mut buffer = vec![0_u8; CHUNK + BLOCK];
    let skew = buffer.as_ptr().align_offset(BLOCK);
    let buffer = &mut buffer[skew..skew + CHUNK];
    let mut read = 0;
    for (offset, length) in regions(size) {
        let mut at = offset;
        while at < offset + length {
            let want = usize::try_from((offset + length - at).min(CHUNK as u64))?;
            let part = &mut buffer[..want];
            let got = file.read_at_once(part, at).with_context(|| format!("at byte {at}"))?;
            if got != want {
                bail!("at byte {at}: {got} bytes were read instead of {want}");
            }
            // Compared as a whole first: nearly all of it is zeros.
            if *part != zeros[..want] {
                let index = part.iter().position(|byte| *byte != 0).unwrap_or(0);
                return Ok(Scan { nonzero: Some(at + index as u64), read });
            }
            at += want as u64;
            read += want as u64;
        }
    }
    Ok(Scan { nonzero: None, read })
}

/// The regions to read, as offset and length; multiples of [`BLOCK`], within `size`.
fn regions(size: u64) -> Vec<(u64, u64)> {
    let block = BLOCK as u64;
    let end = size / block * block;
    // The head holds nearly all signatures, LUKS2's second header (at most at 4 MiB) and LVM's
    // metadata; the tail holds GPT's second table, md 0.9 and 1.0, ZFS's labels 2 and 3, DDF.
    let mut regions = vec![(0, 8 * MIB), (end - 8 * MIB, 8 * MIB)];
    // The backup superblocks of ext2/3/4 with `sparse_super`: groups 1 and powers of 3, 5 and 7.
    for (blocksize, first) in [(1024_u64, 1024_u64), (2048, 0), (4096, 0)] {
        let group_bytes = blocksize * 8 * blocksize;
        for base in [3_u64, 5, 7] {
            let mut group = 1_u64;
            while let Some(at) = group.checked_mul(group_bytes).map(|at| at + first)
                && at < end
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
    regions.extend((0..samples).map(|i| (end / samples * i, 2 * block)));
    regions
        .into_iter()
        .map(|(at, length)| (at / block * block, length))
        .filter(|(at, length)| at + length <= end)
        .collect()
}

/// One positioned read, so that tests can read from something that fails.
trait ReadAt {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const SIZE: u64 = 8 << 30;

    /// A disk of zeros, but for some bytes; optionally failing or short at an offset.
    #[derive(Default)]
    struct Fake {
        bytes: Vec<u64>,
        fail: Option<u64>,
        short: Option<u64>,
        reads: RefCell<u64>,
    }

    impl ReadAt for Fake {
        fn read_at_once(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
            *self.reads.borrow_mut() += 1;
            buffer.fill(0);
            let length = buffer.len() as u64;
            let within = |at: &u64| (offset..offset + length).contains(at);
            if self.fail.as_ref().is_some_and(within) {
                return Err(std::io::Error::from_raw_os_error(nix::libc::EIO));
            }
            for at in self.bytes.iter().filter(|at| within(at)) {
                buffer[usize::try_from(at - offset).unwrap()] = 1;
            }
            let short = self.short.as_ref().is_some_and(within);
            Ok(if short { buffer.len() / 2 } else { buffer.len() })
        }
    }

    #[test]
    fn zeros_everywhere_are_blank() {
        let scan = first_nonzero(&Fake::default(), SIZE).unwrap();
        assert_eq!(scan.nonzero, None);
        assert!(scan.read > 16 * MIB);
    }

    #[test]
    fn one_byte_where_a_signature_can_be_is_seen() {
        let table = [
            0,
            510,                     // MBR
            1024 + 56,               // ext superblock's magic
            64 * 1024 + 64,          // btrfs
            4 * MIB + 6,             // LUKS2's second header
            32_768 * 4096 + 56,      // ext4's first backup superblock
            3 * 32_768 * 4096 + 56,  // its second
            25 * 32_768 * 4096 + 56, // and a later one
            8193 * 1024 + 56,        // the first backup with blocks of 1 KiB
            64 * MIB + 64,           // btrfs' mirror
            SIZE / 4,                // an XFS allocation group
            SIZE - 1,
            SIZE - 512,        // GPT's second header
            SIZE - 64 * 1024,  // md 0.9
            SIZE - 512 * 1024, // a ZFS label
        ];
        for at in table {
            let fake = Fake { bytes: vec![at], ..Fake::default() };
            assert_eq!(first_nonzero(&fake, SIZE).unwrap().nonzero, Some(at), "byte {at}");
        }
    }

    #[test]
    fn a_read_that_fails_or_is_short_is_never_blank() {
        for at in [0, 7 * MIB, 32_768 * 4096, SIZE - 4096] {
            let fails = Fake { fail: Some(at), ..Fake::default() };
            assert!(first_nonzero(&fails, SIZE).is_err(), "EIO at {at}");
            let short = Fake { short: Some(at), ..Fake::default() };
            assert!(first_nonzero(&short, SIZE).is_err(), "short at {at}");
        }
        assert!(first_nonzero(&Fake::default(), 0).is_err(), "a disk of no size");
    }

    #[test]
    fn regions_stay_on_the_disk_and_are_aligned() {
        for size in [64 * MIB, 64 * MIB + 512, 1 << 30, (16 << 40) - 512] {
            for (at, length) in regions(size) {
                assert!(at + length <= size && at % BLOCK as u64 == 0, "{at}+{length} of {size}");
            }
        }
    }

    #[test]
    fn volume_ids_come_from_serials_with_or_without_dash() {
        let id = VolumeId::parse("vol-0123456789abcdef0").unwrap();
        for serial in ["vol0123456789abcdef0", "vol0123456789abcdef0   ", "vol-0123456789abcdef0"] {
            assert_eq!(VolumeId::from_serial(serial), Some(id.clone()), "{serial:?}");
        }
        for serial in ["", "vol", "vol012345678", "vol0123456789ABCDEF0", "AWS0123456789abcdef0"] {
            assert_eq!(VolumeId::from_serial(serial), None, "{serial:?}");
        }
        assert!(VolumeId::from_serial("vol12345678").is_some(), "the old, short form");
    }

    #[test]
    fn the_filesystems_uuid_follows_from_the_volume() {
        let id = |text: &str| VolumeId::parse(text).unwrap().filesystem_uuid();
        // Frozen: another value would make every existing host's volume "not ours".
        assert_eq!(id("vol-0123456789abcdef0").to_string(), "f0b4e71b-1faa-5482-8fe4-ee9f5521efef");
        assert_ne!(id("vol-0123456789abcdef0"), id("vol-0123456789abcdef1"));
    }

    #[test]
    fn blkid_exports_are_read() {
        let ext4 =
            "DEVNAME=/dev/nvme0n1\nUUID=1-2\nLABEL=a b\nVERSION=1.0\nTYPE=ext4\nUSAGE=filesystem\n";
        assert_eq!(
            parse_blkid(ext4),
            Content::Signature {
                name: "ext4".into(),
                uuid: Some("1-2".into()),
                label: Some("a b".into())
            }
        );
        let gpt = "DEVNAME=/dev/nvme0n1\nPTUUID=7\nPTTYPE=gpt\n";
        assert_eq!(
            parse_blkid(gpt),
            Content::Signature { name: "gpt".into(), uuid: None, label: None }
        );
    }

    #[test]
    fn hidden_and_virtual_disks_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        let disk = |name: &str, hidden: &str, device: bool, serial: &str| {
            let dir = root.path().join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("dev"), "259:3\n").unwrap();
            fs::write(dir.join("size"), "16777216\n").unwrap();
            fs::write(dir.join("hidden"), hidden).unwrap();
            if device {
                fs::create_dir_all(dir.join("device")).unwrap();
                fs::write(dir.join("device/serial"), serial).unwrap();
                fs::write(dir.join("device/model"), "Amazon Elastic Block Store   \n").unwrap();
            }
        };
        disk("nvme0n1", "0\n", true, "vol0123456789abcdef0\n");
        disk("nvme0c0n1", "1\n", true, "vol0123456789abcdef0\n");
        disk("loop0", "0\n", false, "");
        let found = disks_under(root.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "nvme0n1");
        assert_eq!(found[0].size, SIZE);
        assert_eq!(found[0].volume_id(), VolumeId::parse("vol-0123456789abcdef0"));
        disk("xvdf", "0\n", true, "");
        let xen = root.path().join("xvdf/device");
        fs::remove_file(xen.join("model")).unwrap();
        fs::write(xen.join("devtype"), "vbd\n").unwrap();
        let found = disks_under(root.path()).unwrap();
        assert_eq!((found[1].name.as_str(), found[1].volume_id()), ("xvdf", None));
        assert_eq!(found[1].told_by, ToldBy::Mapping(None), "a disk of Xen's has no serial number");
        let store = Disk { model: Some(INSTANCE_STORE.into()), ..found[0].clone() };
        assert_eq!(store.volume_id(), None, "an instance store is never a volume");
    }
}
