//! One file, directory or other thing of a tree: how it is opened, and all that is kept of it beside
//! its content.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result};
use rustix::fs::{
    self, AtFlags, FileType, Gid, IFlags, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps,
    Uid, XattrFlags,
};
use rustix::io::Errno;

use super::{KEPT_FLAGS, OWN};

/// The largest list of names and the largest value of extended attributes (xattr(7)).
const XATTR_MAX: usize = 1 << 16;

/// Opens something in an opened directory: never through a link, never across a mount, and without
/// leaving a trace in its times.
pub(super) fn open(dir: BorrowedFd<'_>, name: &CStr, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let mut all = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    if !flags.contains(OFlags::CREATE) {
        all |= OFlags::NOATIME;
    }
    let mode = if flags.contains(OFlags::CREATE) { Mode::RUSR | Mode::WUSR } else { Mode::empty() };
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    fs::openat2(dir, name, all, mode, resolve)
}

pub(super) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// A path for people, on one line.
pub(super) fn shown(path: &[u8]) -> String {
    if path.is_empty() {
        return ".".to_owned();
    }
    let text = String::from_utf8_lossy(path);
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect()
}

/// Something of a tree, as far as its attributes are concerned.
#[derive(Clone, Copy)]
pub(super) enum Node<'a> {
    /// A file or a directory that is open.
    Open(BorrowedFd<'a>),
    /// Anything, by its name in an opened directory; never what a link leads to.
    Named(BorrowedFd<'a>, &'a CStr),
}

/// What is kept of a node, beside its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) kind: FileType,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
    pub(super) modified: (i64, u32),
    pub(super) accessed: (i64, u32),
    pub(super) device: u64,
    pub(super) xattrs: BTreeMap<CString, Vec<u8>>,
    pub(super) flags: IFlags,
}

impl Node<'_> {
    /// A name of the last part of which no link is followed, through the descriptors of this process.
    fn by_descriptor(dir: BorrowedFd<'_>, name: &CStr) -> Vec<u8> {
        [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name.to_bytes()].concat()
    }

    /// All extended attributes. A filesystem without any has none.
    pub(super) fn xattrs(self) -> Result<BTreeMap<CString, Vec<u8>>> {
        let path = match self {
            Self::Named(dir, name) => Self::by_descriptor(dir, name),
            Self::Open(_) => Vec::new(),
        };
        let size = match self {
            Self::Open(fd) => fs::flistxattr_query(fd),
            Self::Named(..) => fs::llistxattr_query(path.as_slice()),
        };
        let mut found = BTreeMap::new();
        match size {
            Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(found),
            Ok(_) => {}
            Err(e) => return Err(e).context("listing extended attributes"),
        }
        let mut list = vec![0; XATTR_MAX];
        let length = match self {
            Self::Open(fd) => fs::flistxattr(fd, &mut list[..]),
            Self::Named(..) => fs::llistxattr(path.as_slice(), &mut list[..]),
        };
        list.truncate(length.context("listing extended attributes")?);
        let mut value = vec![0; XATTR_MAX];
        for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let name = CString::new(name).context("the name of an extended attribute")?;
            let length = match self {
                Self::Open(fd) => fs::fgetxattr(fd, &*name, &mut value[..]),
                Self::Named(..) => fs::lgetxattr(path.as_slice(), &*name, &mut value[..]),
            };
            let length = length.with_context(|| format!("reading the attribute {name:?}"))?;
            found.insert(name, value[..length].to_vec());
        }
        Ok(found)
    }

    fn set_xattr(self, name: &CStr, value: &[u8]) -> rustix::io::Result<()> {
        match self {
            Self::Open(fd) => fs::fsetxattr(fd, name, value, XattrFlags::empty()),
            Self::Named(dir, file) => {
                let path = Self::by_descriptor(dir, file);
                fs::lsetxattr(path.as_slice(), name, value, XattrFlags::empty())
            }
        }
    }

    fn remove_xattr(self, name: &CStr) -> rustix::io::Result<()> {
        match self {
            Self::Open(fd) => fs::fremovexattr(fd, name),
            Self::Named(dir, file) => {
                fs::lremovexattr(Self::by_descriptor(dir, file).as_slice(), name)
            }
        }
    }

    /// What is kept of it. What hostagent itself writes there is not.
    pub(super) fn meta(self, stat: &Stat) -> Result<Meta> {
        let mut xattrs = self.xattrs()?;
        xattrs.retain(|name, _| !is_own(name));
        Ok(Meta {
            kind: kind(stat),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode & 0o7777,
            modified: (stat.st_mtime, narrow(stat.st_mtime_nsec)),
            accessed: (stat.st_atime, narrow(stat.st_atime_nsec)),
            device: if has_device(kind(stat)) { stat.st_rdev } else { 0 },
            xattrs,
            flags: match self {
                Self::Open(fd) => flags(fd)? & KEPT_FLAGS,
                Self::Named(..) => IFlags::empty(),
            },
        })
    }

    /// Gives all that is kept to a node that was just made. An owner takes the set-user-id bit and the
    /// capabilities away, an ACL writes the mode, and nothing can be changed on what is immutable:
    /// hence the order.
    pub(super) fn apply(self, meta: &Meta) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
        let mode = Mode::from_raw_mode(meta.mode);
        match self {
            Self::Open(fd) => {
                fs::fchown(fd, Some(uid), Some(gid)).context("setting its owner")?;
                fs::fchmod(fd, mode).context("setting its mode")?;
            }
            Self::Named(dir, name) => {
                fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                    .context("setting its owner")?;
                // A link has no mode of its own.
                if meta.kind != FileType::Symlink {
                    fs::chmodat(dir, name, mode, AtFlags::empty()).context("setting its mode")?;
                }
            }
        }
        // What the directory above gave it.
        for (name, _) in self.xattrs()? {
            if !meta.xattrs.contains_key(&name) && !is_own(&name) {
                self.remove_xattr(&name).with_context(|| format!("removing {name:?}"))?;
            }
        }
        for (name, value) in &meta.xattrs {
            self.set_xattr(name, value)
                .with_context(|| format!("setting the attribute {name:?}"))?;
        }
        let time = |(seconds, nanoseconds): (i64, u32)| Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds.into(),
        };
        let times =
            Timestamps { last_access: time(meta.accessed), last_modification: time(meta.modified) };
        match self {
            Self::Open(fd) => fs::futimens(fd, &times).context("setting its times")?,
            Self::Named(dir, name) => fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
                .context("setting its times")?,
        }
        if let Self::Open(fd) = self {
            let now = flags(fd)?;
            let wanted = (now - KEPT_FLAGS) | meta.flags;
            if now != wanted {
                fs::ioctl_setflags(fd, wanted).context("setting its attributes (chattr)")?;
            }
        }
        Ok(())
    }
}

impl Meta {
    /// What of this is not the same in the copy, if anything is.
    pub(super) fn difference(&self, copy: &Self) -> Option<String> {
        let differs = |what: &str, here: String, there: String| {
            (here != there).then(|| format!("its {what} is {here}, and the copy's is {there}"))
        };
        differs("type", format!("{:?}", self.kind), format!("{:?}", copy.kind))
            .or_else(|| differs("owner", self.uid.to_string(), copy.uid.to_string()))
            .or_else(|| differs("group", self.gid.to_string(), copy.gid.to_string()))
            .or_else(|| differs("mode", format!("{:04o}", self.mode), format!("{:04o}", copy.mode)))
            .or_else(|| {
                let time = |(seconds, nanoseconds)| format!("{seconds}.{nanoseconds:09}");
                differs("time of modification", time(self.modified), time(copy.modified))
            })
            .or_else(|| differs("device number", self.device.to_string(), copy.device.to_string()))
            .or_else(|| {
                let names = self.xattrs.keys().chain(copy.xattrs.keys());
                let mut unlike =
                    names.filter(|name| self.xattrs.get(*name) != copy.xattrs.get(*name));
                unlike.next().map(|name| format!("its attribute {name:?} is not the copy's"))
            })
            .or_else(|| {
                differs(
                    "attributes (chattr)",
                    format!("{:x}", self.flags.bits()),
                    format!("{:x}", copy.flags.bits()),
                )
            })
    }
}

fn is_own(attribute: &CStr) -> bool {
    attribute.to_bytes().starts_with(OWN.as_bytes())
}

fn has_device(kind: FileType) -> bool {
    matches!(kind, FileType::CharacterDevice | FileType::BlockDevice)
}

/// Nanoseconds, which are below a thousand millions.
pub(super) fn narrow<T: TryInto<u32>>(nanoseconds: T) -> u32 {
    nanoseconds.try_into().unwrap_or(u32::MAX)
}

/// A count in `stat(2)`, of which the type depends on the architecture. None is negative.
pub(super) fn wide<T: TryInto<u64>>(count: T) -> u64 {
    count.try_into().unwrap_or(u64::MAX)
}

/// The attributes of chattr(1); a filesystem that has none has none set.
pub(super) fn flags(fd: BorrowedFd<'_>) -> Result<IFlags> {
    match fs::ioctl_getflags(fd) {
        Ok(flags) => Ok(flags),
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(IFlags::empty()),
        Err(e) => Err(e).context("reading its attributes (chattr)"),
    }
}

/// Takes away what forbids to change or remove it.
pub(super) fn unlock(fd: BorrowedFd<'_>) -> Result<()> {
    let now = flags(fd)?;
    let forbids = IFlags::IMMUTABLE | IFlags::APPEND;
    if now.intersects(forbids) {
        fs::ioctl_setflags(fd, now - forbids).context("making it changeable (chattr)")?;
    }
    Ok(())
}
