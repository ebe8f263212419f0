//! Tests of what is found on a disk: blank, recognised, unrecognised, or not to be read.

use super::*;
use std::time::Instant;

const SIZE: u64 = 8 << 30;

/// A disk of zeros, but for some bytes; optionally failing or short at an offset.
#[derive(Default)]
struct Fake {
    bytes: Vec<u64>,
    fail: Option<u64>,
    short: Option<u64>,
}

impl ReadAt for Fake {
    fn read_at_once(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
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

fn walk(fake: Fake) -> Result<Walk> {
    let deadline = Instant::now() + Duration::from_secs(60);
    walk_over(&mut Reader::new(fake, deadline), &merged(regions(SIZE)), None)
}

#[test]
fn zeros_everywhere_are_blank() {
    let walk = walk(Fake::default()).unwrap();
    assert_eq!(walk.foreign, None);
    assert!(walk.read > 16 * MIB);
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
        assert_eq!(walk(fake).unwrap().foreign, Some(at), "byte {at}");
    }
}

#[test]
fn a_read_that_fails_is_short_or_comes_too_late_is_never_blank() {
    for at in [0, 7 * MIB, 32_768 * 4096, SIZE - 4096] {
        let fails = Fake { fail: Some(at), ..Fake::default() };
        assert!(walk(fails).is_err(), "EIO at {at}");
        let short = Fake { short: Some(at), ..Fake::default() };
        assert!(walk(short).is_err(), "short at {at}");
    }
    let mut late = Reader::new(Fake::default(), Instant::now());
    assert!(walk_over(&mut late, &[(0, 4096)], None).is_err());
}

#[test]
fn a_disk_that_hangs_is_not_waited_for() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let begun = tokio::time::Instant::now() - GRACE;
    let hang = |_| {
        std::thread::sleep(Duration::from_secs(5));
        Ok(())
    };
    let left = runtime.block_on(in_time(begun, Duration::from_millis(100), hang));
    runtime.shutdown_background();
    let said = left.unwrap_err().to_string();
    assert!(said.starts_with("the disk did not answer within"), "{said}");
    assert!(begun.elapsed() < GRACE + Duration::from_secs(4));
}

#[test]
fn a_disk_of_no_size_or_of_an_odd_one_is_not_blank() {
    for size in [0, MIB, 64 * MIB + 512] {
        let file = tempfile::tempfile().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        assert!(look(file, size, false, None, deadline).is_err(), "{size}");
    }
}

#[test]
fn regions_stay_on_the_disk_and_are_aligned() {
    for size in [64 * MIB, 64 * MIB + 4096, 1 << 30, (16 << 40) - 4096] {
        for (at, length) in merged(regions(size)) {
            assert!(at + length <= size && at % BLOCK as u64 == 0, "{at}+{length} of {size}");
            assert!(length % BLOCK as u64 == 0);
        }
    }
}

#[test]
fn ranges_are_joined_and_cut() {
    let joined = merged(vec![(8, 4), (0, 4), (4, 2), (20, 1), (9, 1)]);
    assert_eq!(joined, [(0, 6), (8, 4), (20, 1)]);
    let mib = CHUNK as u64;
    let pieces: Vec<_> = chunks(&[(4096, mib + 4096), (0, 0)]).collect();
    assert_eq!(pieces, [(4096, CHUNK), (4096 + mib, 4096)]);
}

#[test]
fn blkid_exports_are_read() {
    let ext4 =
        "DEVNAME=/dev/nvme0n1\nUUID=1-2\nLABEL=a b\nVERSION=1.0\nTYPE=ext4\nUSAGE=filesystem\n";
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(
        parse_blkid(ext4),
        Signature { name: "ext4".into(), uuid: text("1-2"), label: text("a b") }
    );
    let gpt = "DEVNAME=/dev/nvme0n1\nPTUUID=7\nPTTYPE=gpt\n";
    assert_eq!(parse_blkid(gpt), Signature { name: "gpt".into(), uuid: None, label: None });
}

#[test]
fn both_probes_must_agree() {
    let found = |name: &str, uuid: Option<&str>| Found {
        name: name.into(),
        at: 0,
        uuid: uuid.map(str::to_owned),
    };
    let told = |name: &str, uuid: Option<&str>| {
        let uuid = uuid.map(str::to_owned);
        Some(Signature { name: name.into(), uuid, label: None })
    };
    let walk = |foreign, same| Some(Walk { foreign, read: 9, same, regions: 1 });
    let kind = |told, own: Vec<Found>, walk| {
        let content = combine(told, &Seen { own, walk, bytes: 9, copy: None, entry_types: None });
        serde_json::to_value(content).unwrap()["kind"].as_str().unwrap().to_owned()
    };
    let table = [
        (None, vec![], walk(None, 0), "blank"),
        (None, vec![], walk(None, 512), "unfinished"),
        (None, vec![], walk(Some(7), 512), "unrecognised"),
        (None, vec![found("gpt", None)], None, "contradiction"),
        (None, vec![found("ext4", Some("1"))], None, "contradiction"),
        (told("ext4", Some("1")), vec![found("ext4", Some("1"))], None, "signature"),
        (told("ext3", Some("1")), vec![found("ext4", Some("1"))], None, "signature"),
        (told("ext4", Some("1")), vec![found("ext4", Some("2"))], None, "contradiction"),
        (told("ext4", Some("1")), vec![], None, "contradiction"),
        (told("xfs", Some("1")), vec![found("ext4", Some("1"))], None, "contradiction"),
        (told("zfs_member", None), vec![], None, "signature"),
    ];
    for (i, (told, own, walk, expected)) in table.into_iter().enumerate() {
        assert_eq!(kind(told, own, walk), expected, "row {i}");
    }
}
