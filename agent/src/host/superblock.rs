//! Reading the superblocks of ext4 and XFS by ourselves, from bytes: whose filesystem it is, how
//! large it is, and which parts of the disk it takes to be zero without writing them. Not here:
//! which bytes are read from where ([`super::content`], [`super::format`]), and the recognition of
//! everything else ([`super::signatures`]).
//!
//! The layouts are those of the kernel's documentation ("ext4 Data Structures and Algorithms", "XFS
//! Data Structures and Algorithms").

use anyhow::{Context as _, Result, ensure};
use uuid::Uuid;

/// How many bytes from the beginning of a disk [`Superblock::parse`] needs.
pub const HEAD: usize = 4096;

/// Where ext4's superblock is.
const EXT: usize = 1024;

/// A filesystem's primary superblock, as far as hostagent needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Which filesystem: `ext4` (ext2 and ext3 too) or `xfs`.
    pub kind: &'static str,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its size in bytes.
    pub size: u64,
    /// Whether directories keep the type of each entry, without which overlay2 does not work.
    pub ftype: bool,
    /// Where the sector begins that makes it this filesystem: without that sector nothing
    /// recognises it.
    pub primary: u64,
    /// Blocks of the journal (ext4: by its extents; XFS: by place and length), which a new
    /// filesystem takes to be zero.
    log: Log,
    block: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Log {
    None,
    /// The journal's inode: the root of its tree of extents, and its size in bytes.
    Extents {
        root: [u8; 60],
        size: u64,
    },
    /// First byte and length.
    Range(u64, u64),
}

fn le16(bytes: &[u8], at: usize) -> u64 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]]).into()
}

fn le32(bytes: &[u8], at: usize) -> u64 {
    le16(bytes, at) | le16(bytes, at + 2) << 16
}

fn be16(bytes: &[u8], at: usize) -> u64 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]]).into()
}

fn be32(bytes: &[u8], at: usize) -> u64 {
    be16(bytes, at) << 16 | be16(bytes, at + 2)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    be32(bytes, at) << 32 | be32(bytes, at + 4)
}

fn uuid_at(bytes: &[u8], at: usize) -> Uuid {
    let mut raw = [0; 16];
    raw.copy_from_slice(&bytes[at..at + 16]);
    Uuid::from_bytes(raw)
}

impl Superblock {
    /// From the first [`HEAD`] bytes of a disk; none if neither filesystem is there.
    #[must_use]
    pub fn parse(head: &[u8]) -> Option<Self> {
        let head = head.get(..HEAD)?;
        ext(head).or_else(|| xfs(head))
    }

    /// From the beginning of a block in which a copy of the superblock may be.
    #[must_use]
    pub fn copy(block: &[u8]) -> Option<Self> {
        // Where the primary one begins, a copy of ext4's has no room for a boot sector.
        let mut head = vec![0; HEAD];
        head[EXT..2 * EXT].copy_from_slice(block.get(..EXT)?);
        ext(&head).or_else(|| xfs(block.get(..HEAD)?))
    }

    /// The ranges (first byte and length) that the filesystem takes to be zero although mkfs leaves
    /// them alone: its journal. What a journal holds is replayed after a crash. `read` reads a part
    /// of the filesystem.
    pub fn relies_on_zero(
        &self,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<Vec<(u64, u64)>> {
        match &self.log {
            Log::None => Ok(Vec::new()),
            Log::Range(at, length) => Ok(vec![(*at, *length)]),
            Log::Extents { root, size } => {
                let mut ranges = Vec::new();
                self.extents(root, &mut ranges, &mut read).context("reading ext4's journal")?;
                let total: u64 = ranges.iter().map(|(_, length)| length).sum();
                ensure!(total == *size, "ext4's journal has {size} bytes, its extents {total}");
                Ok(ranges)
            }
        }
    }

    /// Collects a tree of extents (magic 0xF30A; 12 bytes of header, 12 for each entry).
    fn extents(
        &self,
        node: &[u8],
        ranges: &mut Vec<(u64, u64)>,
        read: &mut impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        ensure!(le16(node, 0) == 0xf30a, "there is no tree of extents");
        let (entries, depth) = (le16(node, 2), le16(node, 6));
        ensure!(12 + 12 * entries <= node.len() as u64 && depth <= 5, "the extents make no sense");
        for entry in node[12..].chunks_exact(12).take(usize::try_from(entries)?) {
            if depth == 0 {
                let block = le32(entry, 8) | le16(entry, 6) << 32;
                ranges.push((block.saturating_mul(self.block), le16(entry, 4) * self.block));
            } else {
                let block = le32(entry, 4) | le16(entry, 8) << 32;
                let mut child = vec![0; usize::try_from(self.block)?];
                read(block.saturating_mul(self.block), &mut child)?;
                ensure!(le16(&child, 6) == depth - 1, "the extents' depth makes no sense");
                self.extents(&child, ranges, read)?;
            }
        }
        Ok(())
    }
}

fn ext(head: &[u8]) -> Option<Superblock> {
    let sb = &head[EXT..EXT + 1024];
    let shift = le32(sb, 24);
    if le16(sb, 56) != 0xef53 || shift > 6 {
        return None;
    }
    let block = 1024 << shift;
    let (compatible, incompatible) = (le32(sb, 92), le32(sb, 96));
    let high = if incompatible & 0x80 != 0 { le32(sb, 336) } else { 0 };
    // A copy of the journal's inode (s_jnl_blocks) is in the superblock if s_jnl_backup_type is 1.
    let log = if compatible & 0x4 != 0 && sb[253] == 1 {
        let mut root = [0; 60];
        root.copy_from_slice(&sb[268..328]);
        Log::Extents { root, size: le32(sb, 332) | le32(sb, 328) << 32 }
    } else {
        Log::None
    };
    Some(Superblock {
        kind: "ext4",
        uuid: uuid_at(sb, 104),
        size: (le32(sb, 4) | high << 32).saturating_mul(block),
        ftype: incompatible & 0x2 != 0,
        primary: EXT as u64,
        log,
        block,
    })
}

fn xfs(sb: &[u8]) -> Option<Superblock> {
    if !sb.starts_with(b"XFSB") {
        return None;
    }
    let block = be32(sb, 4);
    // The ftype feature is one bit in version 5, another in version 4.
    let version = be16(sb, 100) & 0xf;
    let ftype = if version >= 5 { be32(sb, 216) & 1 != 0 } else { be32(sb, 200) & 0x200 != 0 };
    let (start, blocks) = (be64(sb, 48), be32(sb, 96));
    let shift = u32::from(sb[124]).min(63);
    // A block's number is that of its allocation group, shifted, and that within the group.
    let place = (start >> shift) * be32(sb, 84) + (start & ((1 << shift) - 1));
    let log = if start == 0 {
        Log::None
    } else {
        Log::Range(place.saturating_mul(block), blocks.saturating_mul(block))
    };
    Some(Superblock {
        kind: "xfs",
        uuid: uuid_at(sb, 32),
        size: be64(sb, 8).saturating_mul(block),
        ftype,
        primary: 0,
        log,
        block,
    })
}

/// Where a filesystem that hostagent made on a disk of this size has the first copies of its
/// superblock: ext4 in blocks of 4096 bytes in its groups 1, 3 and 5, XFS in its second group, which
/// begins at a quarter of the disk or just below 1 TiB.
#[must_use]
pub fn copies(size: u64) -> Vec<u64> {
    let group = 32_768 * 4096;
    let places =
        [group, 3 * group, 5 * group, size.div_ceil(4).next_multiple_of(4096), (1 << 40) - 4096];
    places.into_iter().filter(|at| at + HEAD as u64 <= size).collect()
}

/// How many bytes of an XFS filesystem `statvfs(3)` does not count: its internal log.
#[must_use]
pub fn uncounted(superblock: &Superblock) -> u64 {
    match superblock.log {
        Log::Range(_, length) => length,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first 256 bytes of what mkfs.xfs 6.1 makes of 1 GiB, in sectors of 4096 bytes.
    pub(crate) const XFS: &str = "\
        5846534200001000000000000004000000000000000000000000000000000000\
        f0b4e71b1faa54828fe4ee9f5521efef00000000000200090000000000000080\
        0000000000000081000000000000008200000001000100000000000400000000\
        00004000bca5100002000008686f73746167656e740000000c0c090310000019\
        0000000000000040000000000000003d000000000003bfd40000000000000000\
        0000000000000000000000000000000000000000000000080000000000000000\
        000c1000000010000000018a0000018a000000000000000d0000000b00000000\
        e16af96e00000004000000000000000000000000000000000000000000000000";

    pub(crate) fn xfs_head() -> Vec<u8> {
        let digits: Vec<u8> = XFS.bytes().filter(u8::is_ascii_hexdigit).collect();
        let text = |pair: &[u8]| String::from_utf8_lossy(pair).into_owned();
        let mut head: Vec<u8> =
            digits.chunks(2).map(|pair| u8::from_str_radix(&text(pair), 16).unwrap()).collect();
        head.resize(HEAD, 0);
        head
    }

    #[test]
    fn xfs_is_read() {
        let sb = Superblock::parse(&xfs_head()).unwrap();
        assert_eq!(sb.kind, "xfs");
        assert_eq!(sb.uuid.to_string(), "f0b4e71b-1faa-5482-8fe4-ee9f5521efef");
        assert_eq!((sb.size, sb.ftype, sb.primary), (1 << 30, true, 0));
        // As xfs_db says: logstart 131081 in groups of 65536 blocks (shift 16), 16384 blocks.
        let log = sb.relies_on_zero(|_, _| unreachable!()).unwrap();
        assert_eq!(log, [(131_081 * 4096, 16_384 * 4096)]);
        let mut without = xfs_head();
        without[219] &= !1;
        assert!(!Superblock::parse(&without).unwrap().ftype);
    }

    #[test]
    fn zeros_and_short_heads_are_nothing() {
        assert_eq!(Superblock::parse(&[0; HEAD]), None);
        assert_eq!(Superblock::parse(b"XFSB"), None);
        // A superblock of nonsense is read without harm.
        let mut nonsense = [0xff; HEAD];
        nonsense[..4].copy_from_slice(b"XFSB");
        assert!(Superblock::parse(&nonsense).is_some());
    }
}
