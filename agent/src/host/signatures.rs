//! A search for the signatures of filesystems, partition tables, volume managers, RAID and
//! encryption, apart from libblkid: the second of two probes that must agree before a disk counts as
//! carrying nothing. libblkid is known to miss an ext4 once in thousands of times when it reads the
//! superblock while it is being written (util-linux#3301), and knows nothing where it could not read.
//!
//! It recognises less than libblkid and is less strict: a magic number is enough, a checksum is not
//! looked at. What is found is never formatted, so that too much is better than too little. What the
//! bytes of a found filesystem mean is in [`super::superblock`].

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::superblock::{HEAD, Superblock};

/// Something recognised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// What it is, as blkid(8) names it where that knows it.
    pub name: String,
    /// The byte where its signature is.
    pub at: u64,
    /// The filesystem's UUID, for ext4 and XFS.
    pub uuid: Option<String>,
}

/// Where a signature is.
#[derive(Clone, Copy)]
enum At {
    /// This many bytes from the disk's beginning.
    Head(u64),
    /// This many bytes before its end.
    Tail(u64),
}

use At::{Head, Tail};

/// Name, place and bytes. From the formats' own documentation or headers.
const TABLE: &[(&str, At, &[u8])] = &[
    ("gpt", Head(512), b"EFI PART"),
    ("gpt", Head(4096), b"EFI PART"),
    ("gpt", Tail(512), b"EFI PART"),
    ("gpt", Tail(4096), b"EFI PART"),
    // The mark of a boot sector: a partition table, FAT or NTFS.
    ("dos", Head(510), &[0x55, 0xaa]),
    ("crypto_LUKS", Head(0), b"LUKS\xba\xbe"),
    // The second header of LUKS2, at each place that its specification allows.
    ("crypto_LUKS", Head(0x4000), b"SKUL\xba\xbe"),
    ("crypto_LUKS", Head(0x8000), b"SKUL\xba\xbe"),
    ("crypto_LUKS", Head(0x1_0000), b"SKUL\xba\xbe"),
    ("crypto_LUKS", Head(0x2_0000), b"SKUL\xba\xbe"),
    ("crypto_LUKS", Head(0x4_0000), b"SKUL\xba\xbe"),
    ("crypto_LUKS", Head(0x8_0000), b"SKUL\xba\xbe"),
    ("crypto_LUKS", Head(0x10_0000), b"SKUL\xba\xbe"),
    ("crypto_LUKS", Head(0x20_0000), b"SKUL\xba\xbe"),
    ("crypto_LUKS", Head(0x40_0000), b"SKUL\xba\xbe"),
    ("BitLocker", Head(3), b"-FVE-FS-"),
    // LVM's label is in one of the first four sectors.
    ("LVM2_member", Head(0), b"LABELONE"),
    ("LVM2_member", Head(512), b"LABELONE"),
    ("LVM2_member", Head(1024), b"LABELONE"),
    ("LVM2_member", Head(1536), b"LABELONE"),
    // md 1.1 and 1.2; 0.90 and 1.0 are at the end, at places that depend on the size.
    ("linux_raid_member", Head(0), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("linux_raid_member", Head(4096), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("isw_raid_member", Tail(1024), b"Intel Raid ISM Cfg Sig. "),
    ("ddf_raid_member", Tail(512), &[0xde, 0x11, 0xde, 0x11]),
    ("btrfs", Head(0x1_0040), b"_BHRfS_M"),
    ("btrfs", Head(0x400_0040), b"_BHRfS_M"),
    ("bcache", Head(0x1018), b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("bcachefs", Head(0x1018), b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("swap", Head(4096 - 10), b"SWAPSPACE2"),
    ("swap", Head(8192 - 10), b"SWAPSPACE2"),
    ("swap", Head(16384 - 10), b"SWAPSPACE2"),
    ("swap", Head(65536 - 10), b"SWAPSPACE2"),
    ("swap", Head(4096 - 10), b"SWAP-SPACE"),
    ("swsuspend", Head(4096 - 10), b"S1SUSPEND"),
    ("ntfs", Head(3), b"NTFS    "),
    ("exfat", Head(3), b"EXFAT   "),
    ("vfat", Head(54), b"FAT12   "),
    ("vfat", Head(54), b"FAT16   "),
    ("vfat", Head(82), b"FAT32   "),
    ("iso9660", Head(0x8001), b"CD001"),
    ("udf", Head(0x8001), b"BEA01"),
    ("jfs", Head(0x8000), b"JFS1"),
    ("reiserfs", Head(0x1_0034), b"ReIsEr"),
    ("f2fs", Head(1024), &[0x10, 0x20, 0xf5, 0xf2]),
    ("erofs", Head(1024), &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("squashfs", Head(0), b"hsqs"),
    ("ocfs2", Head(4096), b"OCFSV2"),
    ("gfs2", Head(0x1_0000), &[0x01, 0x16, 0x19, 0x70]),
    ("nilfs2", Head(1030), &[0x34, 0x34]),
    ("vdo", Head(0), b"dmvdo001"),
    ("ceph_bluestore", Head(0), b"bluestore block device"),
    ("VMFS_volume_member", Head(0x10_0000), &[0x0d, 0xd0, 0x01, 0xc0]),
];

/// What is read in one go.
const BLOCK_LENGTH: usize = 4096;
const BLOCK: u64 = BLOCK_LENGTH as u64;

/// Looks for every signature on a disk of `size` bytes. `read` reads whole blocks of 4096 bytes.
pub fn scan(size: u64, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<Vec<Found>> {
    let mut found = filesystem(&mut read)?;
    let mut add = |name: &str, at| found.push(Found { name: name.to_owned(), at, uuid: None });
    let mut places: Vec<(&str, u64, &[u8])> = Vec::new();
    for (name, at, magic) in TABLE {
        let at = match at {
            Head(at) => Some(*at),
            Tail(before) => size.checked_sub(*before),
        };
        places.extend(at.map(|at| (*name, at, *magic)));
    }
    // md 0.90: the last whole 64 KiB but one, in either order of bytes; md 1.0: 8 to 12 KiB before
    // the end.
    let md = (size & !0xffff).checked_sub(0x1_0000);
    places.extend(md.map(|at| ("linux_raid_member", at, &[0xfc, 0x4e, 0x2b, 0xa9][..])));
    places.extend(md.map(|at| ("linux_raid_member", at, &[0xa9, 0x2b, 0x4e, 0xfc][..])));
    let md = size.checked_sub(0x2000).map(|at| at & !0xfff);
    places.extend(md.map(|at| ("linux_raid_member", at, &[0xfc, 0x4e, 0x2b, 0xa9][..])));
    places.sort_by_key(|(_, at, _)| *at);

    let mut block = vec![0; BLOCK_LENGTH];
    let mut loaded = None;
    for (name, at, magic) in places {
        let (number, offset) = (at / BLOCK, (at % BLOCK) as usize);
        let bytes = offset..offset + magic.len();
        if (number + 1) * BLOCK > size || bytes.end > block.len() {
            continue;
        }
        if loaded != Some(number) {
            read(number * BLOCK, &mut block)?;
            loaded = Some(number);
        }
        if block[bytes] == *magic {
            add(name, at);
        }
    }
    for at in zfs(size, &mut read)? {
        add("zfs_member", at);
    }
    Ok(found)
}

/// ext4 or XFS alone: for a disk on which the other probe has found one of them.
pub fn filesystem(mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<Vec<Found>> {
    let mut head = vec![0; HEAD];
    read(0, &mut head)?;
    let found = Superblock::parse(&head).map(|sb| Found {
        name: sb.kind.to_owned(),
        at: sb.primary,
        uuid: Some(sb.uuid.to_string()),
    });
    Ok(found.into_iter().collect())
}

/// ZFS has four labels of 256 KiB, two at each end; the second half of each is a ring of uberblocks.
fn zfs(size: u64, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<Vec<u64>> {
    const LABEL: u64 = 0x4_0000;
    const RING: usize = 0x2_0000;
    const MAGIC: u64 = 0x00ba_b10c;
    let end = size / LABEL * LABEL;
    let mut found = Vec::new();
    let labels = [Some(0), Some(LABEL), end.checked_sub(2 * LABEL), end.checked_sub(LABEL)];
    let mut ring = vec![0; RING];
    for label in labels.into_iter().flatten().filter(|at| at + LABEL <= size) {
        read(label + RING as u64, &mut ring)?;
        let hit = ring.chunks_exact(1024).position(|uberblock| {
            uberblock[..8] == MAGIC.to_le_bytes() || uberblock[..8] == MAGIC.to_be_bytes()
        });
        found.extend(hit.map(|index| label + RING as u64 + 1024 * index as u64));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;
    use std::process::Command;

    const SIZE: u64 = (64 << 20) + 0x1_3000;

    fn scan_file(file: &File, size: u64) -> Vec<Found> {
        scan(size, |at, bytes| {
            assert!(at % BLOCK == 0 && (bytes.len() as u64).is_multiple_of(BLOCK), "unaligned");
            assert!(at + bytes.len() as u64 <= size, "beyond the end");
            Ok(file.read_exact_at(bytes, at)?)
        })
        .unwrap()
    }

    fn names(found: &[Found]) -> Vec<&str> {
        found.iter().map(|f| f.name.as_str()).collect()
    }

    fn blank() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        file
    }

    #[test]
    fn nothing_is_found_on_zeros() {
        assert_eq!(scan_file(&blank(), SIZE), []);
    }

    #[test]
    fn every_row_is_found_where_it_says() {
        for (name, at, magic) in TABLE {
            let file = blank();
            let at = match at {
                Head(at) => *at,
                Tail(before) => SIZE - before,
            };
            file.write_all_at(magic, at).unwrap();
            let found = scan_file(&file, SIZE);
            assert!(
                found.iter().any(|f| f.name == *name && f.at == at),
                "{name} at {at}: {found:?}"
            );
        }
    }

    #[test]
    fn what_depends_on_the_size_is_found() {
        // md 0.90 by its driver's formula, md 1.0 by mdadm's, ZFS's labels 1 and 3.
        let table: [(&str, u64, &[u8]); 4] = [
            ("linux_raid_member", (SIZE & !65535) - 65536, &[0xfc, 0x4e, 0x2b, 0xa9]),
            ("linux_raid_member", (SIZE / 512 - 16) / 8 * 8 * 512, &[0xfc, 0x4e, 0x2b, 0xa9]),
            ("zfs_member", 0x4_0000 + 0x2_0000 + 5 * 1024, &0x00ba_b10c_u64.to_le_bytes()),
            ("zfs_member", (SIZE >> 18 << 18) - 0x2_0000, &0x00ba_b10c_u64.to_be_bytes()),
        ];
        for (name, at, magic) in table {
            let file = blank();
            file.write_all_at(magic, at).unwrap();
            let found = scan_file(&file, SIZE);
            assert!(
                found.iter().any(|f| f.name == name && f.at == at),
                "{name} at {at}: {found:?}"
            );
        }
    }

    #[test]
    fn what_real_tools_make_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let make = |program: &str, args: &[&str]| -> Vec<Found> {
            let file = File::create(&path).unwrap();
            file.set_len(SIZE).unwrap();
            let done = Command::new(program).args(args).arg(&path).output().unwrap();
            assert!(done.status.success(), "{program}: {done:?}");
            scan_file(&File::open(&path).unwrap(), SIZE)
        };
        let uuid = "f0b4e71b-1faa-5482-8fe4-ee9f5521efef";
        let found = make("/sbin/mkfs.ext4", &["-q", "-F", "-U", uuid]);
        assert_eq!(names(&found), ["ext4"]);
        assert_eq!(found[0].uuid.as_deref(), Some(uuid));
        assert_eq!(names(&make("/sbin/mkfs.ext4", &["-q", "-F", "-b", "1024"])), ["ext4"]);
        assert_eq!(names(&make("/sbin/mkswap", &["-q"])), ["swap"]);
        // Where XFS's tools are installed; its bytes are in the tests of `superblock` in any case.
        if Path::new("/sbin/mkfs.xfs").exists() {
            let big = File::create(&path).unwrap();
            big.set_len(512 << 20).unwrap();
            let done = Command::new("/sbin/mkfs.xfs").args(["-q", "-f"]).arg(&path).output();
            assert!(done.unwrap().status.success());
            assert_eq!(names(&scan_file(&File::open(&path).unwrap(), 512 << 20)), ["xfs"]);
        }
    }

    #[test]
    fn a_failed_read_is_an_error() {
        for bad in [0, 4096, 0x40_0000, 0x2_0000, SIZE - 4096] {
            let read = |at: u64, bytes: &mut [u8]| {
                anyhow::ensure!(!(at..at + bytes.len() as u64).contains(&bad), "EIO");
                Ok(())
            };
            assert!(scan(SIZE, read).is_err(), "byte {bad}");
        }
    }
}
