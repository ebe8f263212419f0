//! Trees of every kind are copied and compared; one change after another must be seen, and at the
//! right place. Run as root, as CI does: nobody else can make devices and owners.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, IFlags, Mode, Timespec, Timestamps, XattrFlags};

use super::*;

/// Two capabilities in the form of `security.capability` (capability.h, VFS_CAP_REVISION_2).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An ACL that lets user 1000 read and write (posix_acl_xattr.h), with a mask.
const ACL: [u8; 44] = [
    2, 0, 0, 0, // version
    1, 0, 6, 0, 255, 255, 255, 255, // owner rw-
    2, 0, 6, 0, 232, 3, 0, 0, // user 1000 rw-
    4, 0, 4, 0, 255, 255, 255, 255, // group r--
    16, 0, 6, 0, 255, 255, 255, 255, // mask rw-
    32, 0, 0, 0, 255, 255, 255, 255, // others ---
];

/// Not root: the test cannot be made here, and says so.
fn not_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: must be root to make devices and owners");
    }
    !root
}

fn open(path: &Path) -> OwnedFd {
    fs::File::open(path).unwrap().into()
}

/// A directory that holds the tree `a` and will hold its copy `b`.
fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("a")).unwrap();
    dir
}

fn copied(dir: &Path) -> PathBuf {
    let target = dir.join("b");
    fs::create_dir(&target).unwrap();
    copy(open(&dir.join("a")), open(&target), &Progress::default()).unwrap();
    target
}

fn compared(dir: &Path) -> Result<Alike, Difference> {
    compare(open(&dir.join("a")), open(&dir.join("b")), &Progress::default()).unwrap()
}

fn set_times(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(CWD, path, &times, flags).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|e| panic!("{name} on {}: {e}", path.display()));
}

fn set_flags(path: &Path, flags: IFlags) {
    let file = open(path);
    let now = rustix::fs::ioctl_getflags(&file).unwrap() - KEPT_FLAGS;
    rustix::fs::ioctl_setflags(&file, now | flags).unwrap();
}

/// Gives something in the copy the time of the same in the tree.
fn copy_times(path: &str, b: &Path) {
    let meta = fs::symlink_metadata(b.with_file_name("a").join(path)).unwrap();
    set_times(&b.join(path), meta.mtime(), meta.mtime_nsec());
}

fn make_node(path: &Path, kind: FileType, device: u64) {
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device).unwrap();
}

fn chown(path: &Path, uid: u32, gid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
}

/// What can be said of a tree without the code under test: for each path its attributes, its content,
/// and the first path of the same file.
fn manifest(top: &Path) -> BTreeMap<PathBuf, String> {
    fn visit(
        top: &Path,
        path: &Path,
        inodes: &mut BTreeMap<u64, PathBuf>,
        all: &mut BTreeMap<PathBuf, String>,
    ) {
        let meta = fs::symlink_metadata(path).unwrap();
        let relative = path.strip_prefix(top).unwrap().to_path_buf();
        let mut names = vec![0; 1 << 16];
        let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
        let mut xattrs = BTreeMap::new();
        for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
            let mut value = vec![0; 1 << 16];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            xattrs.insert(name.to_vec(), value[..length].to_vec());
        }
        let content = if meta.is_file() {
            fs::read(path).unwrap()
        } else if meta.is_symlink() {
            fs::read_link(path).unwrap().into_os_string().into_vec()
        } else {
            Vec::new()
        };
        let content = {
            use std::hash::{DefaultHasher, Hash as _, Hasher as _};
            let mut hasher = DefaultHasher::new();
            content.hash(&mut hasher);
            format!("{} {:x}", content.len(), hasher.finish())
        };
        let first = inodes.entry(meta.ino()).or_insert_with(|| relative.clone()).clone();
        let links = if meta.is_dir() { 0 } else { meta.nlink() };
        let flags = if meta.is_file() || meta.is_dir() {
            rustix::fs::ioctl_getflags(open(path)).unwrap() & KEPT_FLAGS
        } else {
            IFlags::empty()
        };
        let of =
            (meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec(), meta.rdev());
        all.insert(relative, format!("{of:?} {links} {first:?} {xattrs:?} {flags:?} {content}"));
        if meta.is_dir() {
            let mut entries: Vec<_> =
                fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
            entries.sort();
            for entry in entries {
                visit(top, &entry, inodes, all);
            }
        }
    }
    let mut all = BTreeMap::new();
    visit(top, top, &mut BTreeMap::new(), &mut all);
    all
}

/// One of everything that Docker's storage can hold.
fn everything(a: &Path) {
    fs::create_dir_all(a.join("overlay2/ab/diff/etc")).unwrap();
    fs::create_dir(a.join("empty")).unwrap();
    fs::write(a.join("file"), "content").unwrap();
    fs::write(a.join("none"), "").unwrap();
    fs::write(a.join("overlay2/ab/diff/etc/passwd"), vec![7; 3_000_000]).unwrap();
    fs::hard_link(a.join("file"), a.join("overlay2/ab/linked")).unwrap();
    fs::write(a.join("setuid"), "x").unwrap();
    chown(&a.join("setuid"), 12, 34);
    fs::set_permissions(a.join("setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::write(a.join("capable"), "x").unwrap();
    set_xattr(&a.join("capable"), "security.capability", &CAPABILITY);
    fs::write(a.join("acl"), "x").unwrap();
    set_xattr(&a.join("acl"), "system.posix_acl_access", &ACL);
    set_xattr(&a.join("empty"), "system.posix_acl_default", &ACL);
    set_xattr(&a.join("file"), "user.note", b"a\0b");
    set_xattr(&a.join("overlay2/ab/diff/etc"), "trusted.overlay.opaque", b"y");
    make_node(&a.join("overlay2/ab/diff/gone"), FileType::CharacterDevice, 0);
    make_node(&a.join("overlay2/backing"), FileType::BlockDevice, rustix::fs::makedev(254, 3));
    make_node(&a.join("fifo"), FileType::Fifo, 0);
    make_node(&a.join("socket"), FileType::Socket, 0);
    symlink("/etc/passwd", a.join("outside")).unwrap();
    symlink("../../..", a.join("overlay2/ab/up")).unwrap();
    set_xattr(&a.join("outside"), "trusted.t", b"on a link");
    chown(&a.join("outside"), 5, 6);
    let mut sparse = fs::File::create(a.join("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(8 << 20)).unwrap();
    sparse.write_all(b"in the middle").unwrap();
    sparse.set_len(64 << 20).unwrap();
    drop(sparse);
    fs::write(a.join(OsStr::from_bytes(b"new\nline\xff\xfe")), "odd").unwrap();
    fs::write(a.join("immutable"), "x").unwrap();
    fs::hard_link(a.join("immutable"), a.join("overlay2/immutable")).unwrap();
    set_times(&a.join("file"), -5, 999_999_999);
    set_times(&a.join("outside"), 4_000_000_000, 1);
    set_times(&a.join("overlay2/ab"), 1, 2);
    set_flags(&a.join("immutable"), IFlags::IMMUTABLE);
    fs::set_permissions(a, fs::Permissions::from_mode(0o710)).unwrap();
    set_xattr(a, MARK, b"not a part of the tree");
}

/// Makes what `everything` made removable.
fn release(dir: &Path) {
    for path in ["a/immutable", "b/immutable"] {
        if dir.join(path).exists() {
            set_flags(&dir.join(path), IFlags::empty());
        }
    }
}

#[test]
fn everything_is_kept() {
    if not_root() {
        return;
    }
    let dir = place();
    everything(&dir.path().join("a"));
    let b = copied(dir.path());
    let (mut here, there) = (manifest(&dir.path().join("a")), manifest(&b));
    let top = here.get_mut(Path::new("")).unwrap();
    *top = top.replace(&format!("{:?}", MARK.as_bytes().to_vec()), "mark");
    for (path, what) in &here {
        if path != Path::new("") {
            assert_eq!(Some(what), there.get(path), "{}", path.display());
        }
    }
    assert_eq!(here.len(), there.len());
    assert_eq!(compared(dir.path()), Ok(Alike::default()));
    let blocks = |path: &str| fs::metadata(dir.path().join(path)).unwrap().blocks();
    assert!(blocks("b/sparse") <= blocks("a/sparse"), "the holes are filled");
    let marked = rustix::fs::getxattr(&b, MARK, &mut [0; 64][..]);
    assert_eq!(marked, Err(rustix::io::Errno::NODATA), "the mark is copied");
    release(dir.path());
}

type Change = fn(&Path);

/// Where a copy is changed, what has to be said of it, and the change.
const CHANGES: [(&str, &str, Change); 32] = [
    ("file", "content differs", |b| fs::write(b.join("file"), "Content").unwrap()),
    ("file", "bytes", |b| fs::write(b.join("file"), "contents").unwrap()),
    ("overlay2/ab/diff/etc/passwd", "differs from byte 2999999", |b| {
        let mut data = vec![7; 3_000_000];
        data[2_999_999] = 8;
        fs::write(b.join("overlay2/ab/diff/etc/passwd"), data).unwrap();
    }),
    ("sparse", "differs", |b| {
        let mut file = fs::File::options().write(true).open(b.join("sparse")).unwrap();
        file.seek(SeekFrom::Start(40 << 20)).unwrap();
        file.write_all(b"x").unwrap();
    }),
    ("sparse", "beside holes", |b| {
        let mut file = fs::File::options().write(true).open(b.join("sparse")).unwrap();
        file.seek(SeekFrom::Start(40 << 20)).unwrap();
        file.write_all(&vec![0; 1 << 20]).unwrap();
    }),
    ("setuid", "mode is 6755", |b| {
        fs::set_permissions(b.join("setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
    }),
    ("setuid", "owner", |b| {
        chown(&b.join("setuid"), 13, 34);
        fs::set_permissions(b.join("setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    }),
    ("setuid", "group", |b| {
        chown(&b.join("setuid"), 12, 35);
        fs::set_permissions(b.join("setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    }),
    ("outside", "owner", |b| chown(&b.join("outside"), 6, 6)),
    ("outside", "leads to", |b| {
        fs::remove_file(b.join("outside")).unwrap();
        symlink("/etc/shadow", b.join("outside")).unwrap();
        set_xattr(&b.join("outside"), "trusted.t", b"on a link");
        chown(&b.join("outside"), 5, 6);
        set_times(&b.join("outside"), 4_000_000_000, 1);
    }),
    ("outside", "time of modification", |b| set_times(&b.join("outside"), 4_000_000_000, 2)),
    ("outside", "trusted.t", |b| set_xattr(&b.join("outside"), "trusted.t", b"else")),
    ("file", "time of modification", |b| set_times(&b.join("file"), -5, 999_999_998)),
    ("overlay2/ab", "time of modification", |b| set_times(&b.join("overlay2/ab"), 2, 2)),
    ("file", "user.note", |b| set_xattr(&b.join("file"), "user.note", b"a")),
    ("none", "user.more", |b| set_xattr(&b.join("none"), "user.more", b"")),
    ("capable", "security.capability", |b| {
        rustix::fs::removexattr(b.join("capable"), "security.capability").unwrap();
    }),
    ("acl", "posix_acl_access", |b| {
        rustix::fs::removexattr(b.join("acl"), "system.posix_acl_access").unwrap();
        fs::set_permissions(b.join("acl"), fs::Permissions::from_mode(0o660)).unwrap();
    }),
    ("empty", "posix_acl_default", |b| {
        rustix::fs::removexattr(b.join("empty"), "system.posix_acl_default").unwrap();
    }),
    ("overlay2/ab/diff/etc", "opaque", |b| {
        set_xattr(&b.join("overlay2/ab/diff/etc"), "trusted.overlay.opaque", b"x");
    }),
    ("overlay2/ab/diff/gone", "missing", |b| {
        fs::remove_file(b.join("overlay2/ab/diff/gone")).unwrap();
    }),
    ("overlay2/ab/diff/gone", "device number", |b| {
        fs::remove_file(b.join("overlay2/ab/diff/gone")).unwrap();
        make_node(&b.join("overlay2/ab/diff/gone"), FileType::CharacterDevice, 5);
        copy_times("overlay2/ab/diff/gone", b);
    }),
    ("overlay2/backing", "type", |b| {
        fs::remove_file(b.join("overlay2/backing")).unwrap();
        let device = rustix::fs::makedev(254, 3);
        make_node(&b.join("overlay2/backing"), FileType::CharacterDevice, device);
    }),
    ("fifo", "type", |b| {
        fs::remove_file(b.join("fifo")).unwrap();
        make_node(&b.join("fifo"), FileType::Socket, 0);
    }),
    ("none", "type", |b| {
        fs::remove_file(b.join("none")).unwrap();
        fs::create_dir(b.join("none")).unwrap();
    }),
    ("socket", "missing", |b| fs::remove_file(b.join("socket")).unwrap()),
    ("empty", "missing", |b| fs::remove_dir(b.join("empty")).unwrap()),
    ("overlay2/more", "copy only", |b| fs::write(b.join("overlay2/more"), "x").unwrap()),
    ("none", "linked with the copy of another", |b| {
        fs::remove_file(b.join("none")).unwrap();
        fs::hard_link(b.join("file"), b.join("none")).unwrap();
        copy_times("file", b);
    }),
    ("overlay2/ab/linked", "linked with", |b| {
        fs::remove_file(b.join("overlay2/ab/linked")).unwrap();
        fs::write(b.join("overlay2/ab/linked"), "content").unwrap();
        set_xattr(&b.join("overlay2/ab/linked"), "user.note", b"a\0b");
        set_times(&b.join("overlay2/ab/linked"), -5, 999_999_999);
    }),
    ("immutable", "chattr", |b| set_flags(&b.join("immutable"), IFlags::empty())),
    ("", "mode is 0710", |b| {
        fs::set_permissions(b, fs::Permissions::from_mode(0o711)).unwrap();
    }),
];

#[test]
fn every_difference_is_seen_where_it_is() {
    if not_root() {
        return;
    }
    for (path, what, change) in CHANGES {
        let dir = place();
        everything(&dir.path().join("a"));
        let b = copied(dir.path());
        change(&b);
        // What was put in or taken away changed the directory's time: that is not what is looked for.
        let parent = Path::new(path).parent().unwrap_or(Path::new(""));
        let meta = fs::metadata(dir.path().join("a").join(parent)).unwrap();
        if !path.is_empty() {
            set_times(&b.join(parent), meta.mtime(), meta.mtime_nsec());
        }
        let meta = fs::symlink_metadata(dir.path().join("a").join(path));
        let alone = fs::symlink_metadata(b.join(path)).is_ok_and(|m| m.is_file() && m.nlink() < 3);
        if let (Ok(meta), true) = (meta, alone && !what.contains("time")) {
            set_times(&b.join(path), meta.mtime(), meta.mtime_nsec());
        }
        let difference = compared(dir.path()).unwrap_err();
        release(dir.path());
        let seen = String::from_utf8_lossy(&difference.path).into_owned();
        // Of two links either may be met first.
        let links = [["file", "overlay2/ab/linked"], ["immutable", "overlay2/immutable"]];
        let same = seen == path || links.iter().any(|l| l.contains(&path) && l.contains(&&*seen));
        assert!(same, "{path}: {difference}");
        let expected = difference.what.contains(what) || links.concat().contains(&path);
        assert!(expected, "{path}: {difference}, not {what}");
    }
}

#[test]
fn what_is_linked_outside_is_said() {
    let dir = place();
    fs::write(dir.path().join("a/f"), "x").unwrap();
    fs::hard_link(dir.path().join("a/f"), dir.path().join("outside")).unwrap();
    let b = copied(dir.path());
    assert_eq!(fs::metadata(b.join("f")).unwrap().nlink(), 1);
    let alike = compared(dir.path()).unwrap();
    assert_eq!(alike.linked_outside.as_deref(), Some("f"));
    // A link of the copy to somewhere else is none of the tree's.
    fs::hard_link(b.join("f"), dir.path().join("elsewhere")).unwrap();
    assert!(compared(dir.path()).is_err());
}

#[test]
fn nothing_leads_out_of_a_tree() {
    let dir = place();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "mine").unwrap();
    symlink(&outside, dir.path().join("a/link")).unwrap();
    symlink("../outside/precious", dir.path().join("a/file")).unwrap();
    let b = copied(dir.path());
    assert!(fs::symlink_metadata(b.join("link")).unwrap().is_symlink());
    let parent = open(dir.path());
    for tree in [c"a", c"b"] {
        erase(parent.as_fd(), tree, &Progress::default()).unwrap();
    }
    assert_eq!(fs::read_to_string(outside.join("precious")).unwrap(), "mine");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    // A link in the place of the tree is not followed either.
    symlink(&outside, dir.path().join("a")).unwrap();
    assert!(erase(parent.as_fd(), c"a", &Progress::default()).is_err());
    assert!(remove(parent.as_fd(), c"a", &Progress::default()).is_err());
    assert_eq!(fs::read_to_string(outside.join("precious")).unwrap(), "mine");
}

#[test]
fn nothing_crosses_a_mount() {
    // Whatever is mounted below /dev or /proc on this machine.
    let mounts = crate::host::mounts::all().unwrap();
    let Some(mount) = mounts.iter().find(|m| m.mount_point == "/dev/shm") else {
        eprintln!("skipped: nothing is mounted on /dev/shm");
        return;
    };
    let name = CString::new(mount.mount_point.trim_start_matches("/dev/")).unwrap();
    assert_eq!(
        open_dir(open(Path::new("/dev")).as_fd(), &name).err(),
        Some(rustix::io::Errno::XDEV)
    );
}

#[test]
fn erased_files_hold_zeros() {
    let dir = place();
    let a = dir.path().join("a");
    let path = |name: &str| a.join(name);
    fs::create_dir(path("deep")).unwrap();
    fs::write(path("one"), vec![b'x'; 1_500_000]).unwrap();
    fs::write(path("two"), "secret").unwrap();
    fs::hard_link(path("two"), path("deep/two")).unwrap();
    fs::write(path("shared"), "not ours alone").unwrap();
    fs::hard_link(path("shared"), dir.path().join("kept")).unwrap();
    let mut held: Vec<fs::File> =
        ["one", "two"].iter().map(|name| fs::File::open(path(name)).unwrap()).collect();
    erase(open(dir.path()).as_fd(), c"a", &Progress::default()).unwrap();
    for file in &mut held {
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert!(!content.is_empty() && content.iter().all(|byte| *byte == 0));
    }
    assert_eq!(fs::read_to_string(dir.path().join("kept")).unwrap(), "not ours alone");
    assert!(!a.exists());
    erase(open(dir.path()).as_fd(), c"a", &Progress::default()).unwrap();
}

#[test]
fn deep_trees_are_walked() {
    raise_descriptor_limit();
    let dir = place();
    let mut fd = open(&dir.path().join("a"));
    for _ in 0..700 {
        rustix::fs::mkdirat(&fd, "d", Mode::RWXU).unwrap();
        fd = open_dir(fd.as_fd(), c"d").unwrap();
    }
    drop(fd);
    copied(dir.path());
    assert_eq!(compared(dir.path()), Ok(Alike::default()));
    let usage = measure(open(&dir.path().join("b")), &Progress::default()).unwrap();
    assert_eq!(usage.inodes, 701);
    for tree in [c"a", c"b"] {
        remove(open(dir.path()).as_fd(), tree, &Progress::default()).unwrap();
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn holes_and_further_links_take_nothing() {
    let dir = place();
    let a = dir.path().join("a");
    fs::File::create(a.join("sparse")).unwrap().set_len(1 << 30).unwrap();
    fs::write(a.join("file"), vec![1; 1 << 20]).unwrap();
    fs::hard_link(a.join("file"), a.join("again")).unwrap();
    rustix::fs::fsync(open(&a.join("file"))).unwrap();
    let usage = measure(open(&a), &Progress::default()).unwrap();
    assert_eq!(usage.inodes, 3);
    assert!((1 << 20..2 << 20).contains(&usage.bytes), "{usage:?}");
}

#[test]
fn cancelled_work_ends() {
    let dir = place();
    fs::write(dir.path().join("a/f"), "x").unwrap();
    fs::create_dir(dir.path().join("b")).unwrap();
    let progress = Progress::default();
    progress.cancel();
    let result = copy(open(&dir.path().join("a")), open(&dir.path().join("b")), &progress);
    assert!(result.is_err());
}

/// One thing of a random tree.
#[derive(Debug, Clone)]
struct Thing {
    /// Which of the directories made before it is in.
    parent: prop::sample::Index,
    name: Vec<u8>,
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    time: (i64, i64),
    xattr: Option<(&'static str, Vec<u8>)>,
}

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    File(Vec<(u32, Vec<u8>)>),
    /// To one of the files made before.
    Link(prop::sample::Index),
    Symlink(Vec<u8>),
    Node(u8, u32),
}

fn thing() -> impl Strategy<Value = Thing> {
    let byte = prop_oneof![1..=46u8, 48..=255u8];
    let kind = prop_oneof![
        3 => Just(Kind::Directory),
        4 => prop::collection::vec((0..3_000_000u32, prop::collection::vec(any::<u8>(), 0..5000)), 0..4)
            .prop_map(Kind::File),
        2 => any::<prop::sample::Index>().prop_map(Kind::Link),
        1 => prop::collection::vec(1..=255u8, 1..300).prop_map(Kind::Symlink),
        2 => (0..4u8, 0..300u32).prop_map(|(kind, device)| Kind::Node(kind, device)),
    ];
    let xattr = prop::option::of(prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200).prop_map(|v| ("trusted.overlay.x", v)),
        Just(("system.posix_acl_access", ACL.to_vec())),
        Just(("security.capability", CAPABILITY.to_vec())),
        prop::collection::vec(any::<u8>(), 0..200).prop_map(|v| ("user.x", v)),
    ]);
    let attributes = (0..0o10000u32, (0..70000u32, 0..70000u32));
    // What ext4 can hold: to the year 2446.
    let time = (-2_000_000_000..15_000_000_000i64, 0..1_000_000_000i64);
    let name = prop::collection::vec(byte, 1..30);
    (any::<prop::sample::Index>(), name, kind, attributes, time, xattr).prop_map(
        |(parent, name, kind, (mode, owner), time, xattr)| Thing {
            parent,
            name,
            kind,
            mode,
            owner,
            time,
            xattr,
        },
    )
}

/// Makes a random tree; what cannot be (a name that is taken, a user attribute on a device) is left
/// out.
fn make(top: &Path, things: &[Thing]) {
    let mut dirs = vec![top.to_path_buf()];
    let mut files: Vec<PathBuf> = Vec::new();
    let mut made = Vec::new();
    for thing in things {
        let path = dirs[thing.parent.index(dirs.len())].join(OsStr::from_bytes(&thing.name));
        if path.as_os_str().len() > 3000 || fs::symlink_metadata(&path).is_ok() {
            continue;
        }
        match &thing.kind {
            Kind::Directory => {
                fs::create_dir(&path).unwrap();
                dirs.push(path.clone());
            }
            Kind::File(parts) => {
                let mut file = fs::File::create(&path).unwrap();
                for (place, data) in parts {
                    file.seek(SeekFrom::Start((*place).into())).unwrap();
                    file.write_all(data).unwrap();
                }
                files.push(path.clone());
            }
            Kind::Link(to) if !files.is_empty() => {
                fs::hard_link(&files[to.index(files.len())], &path).unwrap();
            }
            Kind::Link(_) => continue,
            Kind::Symlink(to) => symlink(OsStr::from_bytes(to), &path).unwrap(),
            Kind::Node(kind, device) => {
                let kind = [
                    FileType::CharacterDevice,
                    FileType::BlockDevice,
                    FileType::Fifo,
                    FileType::Socket,
                ][usize::from(*kind)];
                let device = rustix::fs::makedev(*device, *device);
                make_node(&path, kind, device);
            }
        }
        made.push((path, thing));
    }
    // Last made, first changed: what is in a directory changes its time.
    for (path, thing) in made.into_iter().rev() {
        chown(&path, thing.owner.0, thing.owner.1);
        if !matches!(thing.kind, Kind::Symlink(_)) {
            fs::set_permissions(&path, fs::Permissions::from_mode(thing.mode)).unwrap();
            if let Some((name, value)) = &thing.xattr {
                let set = rustix::fs::lsetxattr(&path, *name, value, XattrFlags::empty());
                // Not every kind of file can have it.
                let _ = set;
            }
        }
        set_times(&path, thing.time.0, thing.time.1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn a_copy_of_any_tree_is_its_like(things in prop::collection::vec(thing(), 0..40)) {
        if not_root() {
            return Ok(());
        }
        let dir = place();
        make(&dir.path().join("a"), &things);
        let before = manifest(&dir.path().join("a"));
        let b = copied(dir.path());
        prop_assert_eq!(&before, &manifest(&b));
        prop_assert_eq!(&before, &manifest(&dir.path().join("a")));
        prop_assert_eq!(compared(dir.path()), Ok(Alike::default()));
        let parent = open(dir.path());
        erase(parent.as_fd(), c"a", &Progress::default()).unwrap();
        remove(parent.as_fd(), c"b", &Progress::default()).unwrap();
        prop_assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
