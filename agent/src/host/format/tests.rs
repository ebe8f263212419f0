//! Tests of formatting: images, power cuts between any two writes, and what is written over what.

use super::image::{arguments, room};
use super::*;
use crate::host::superblock::{self, Superblock};
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
    let left =
        |uuid| Inspection { copy: Some(copy(uuid)), ..seen(Content::Unrecognised { offset: 1 }) };
    assert!(still(&order, &left(UUID), false).is_err());
    assert!(still(&order, &left(UUID), true).is_ok());
    assert!(still(&order, &left(Uuid::nil()), false).is_ok());
}

fn order_for(device: &DataDevice, onto: Onto) -> Order {
    Order {
        volumes: device.volumes.clone(),
        filesystem: Filesystem::Ext4,
        uuid: UUID,
        onto,
        allowed: true,
        instance_id: "i-0123456789abcdef0".into(),
    }
}

fn is_blank(path: &Path) -> bool {
    fs::read(path).unwrap().iter().all(|byte| *byte == 0)
}

#[tokio::test]
async fn a_device_that_somebody_holds_is_refused_though_nothing_explains_it() {
    let Some(loop_device) = crate::host::loops::Loop::new(8 << 20) else { return };
    let device = loop_device.data_device();
    // As mkfs does, or a mount that is only about to be made.
    let mut exclusive = OpenOptions::new();
    exclusive.read(true).custom_flags(nix::libc::O_EXCL);
    let holder = exclusive.open(&loop_device.path).unwrap();
    assert_eq!(block::users(device.number()).unwrap(), Vec::<String>::new());
    for onto in [Onto::Blank, Onto::Unfinished, Onto::Unrecognised] {
        let refused = format(&order_for(&device, onto), &device, &Ahead::default()).await;
        let said = format!("{:#}", refused.unwrap_err());
        assert!(said.contains("is in use, though nothing explains by whom"), "{onto:?}: {said}");
    }
    drop(holder);
    assert!(is_blank(&loop_device.path));
}

#[test]
fn nothing_is_written_to_a_disk_that_became_another() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let Some(loop_device) = crate::host::loops::Loop::new(SIZE) else { return };
    let device = loop_device.data_device();
    let opened = OpenOptions::new().read(true).write(true).open(&loop_device.path).unwrap();
    // As after an interrupted format, which has left its intent already.
    let order = order_for(&device, Onto::Unfinished);
    let mut other = device.clone();
    let disk = crate::host::device::example(device.number()).disk().unwrap().clone();
    other.layer.kind = crate::host::chain::Kind::Disk(disk);
    let refused = write(&opened, &image, &order, &other, deadline()).unwrap_err();
    assert!(format!("{refused:#}").contains("by now, and was"), "{refused:#}");
    opened.sync_all().unwrap();
    assert!(is_blank(&loop_device.path));
    // It is this that has kept it from being written to.
    write(&opened, &image, &order, &device, deadline()).unwrap();
    assert!(superblock(&loop_device.path).is_some());
}
