//! Moves a storage directory of Docker's, with all that it holds, from the root disk to the data
//! volume: copied, compared, and only then switched; and later erases the old copy.
//!
//! Four places matter, for `/var/lib/docker` (with `/var/lib/containerd` it is the same):
//!
//! | | |
//! |---|---|
//! | *old* | `/var/lib/docker`: where the data is |
//! | *incoming* | `/data/docker.hostagent-incoming`: a copy that is being made |
//! | *new* | `/data/docker`: where the data will be, mounted on *old* by then |
//! | *left* | `/var/lib/.hostagent-migrated-docker-VOLUME`: the old copy after the switch |
//!
//! A copy that was compared, and its original, get one and the same *mark*, an attribute of their top
//! directories that is drawn anew each time; the original keeps the time at which the comparison began,
//! too. Then *incoming* is renamed to *new*, *old* to *left*, and
//! an empty *old* is made. Each of these is atomic and flushed before the next, so that an interrupted
//! migration leaves one of these states, and what is done next follows from the disk alone:
//!
//! | *old* | *new* | *left* | what happened | what is done |
//! |---|---|---|---|---|
//! | data | none, or unused | – | nothing, or a copy was not finished | *incoming* is removed, and all begins anew |
//! | data | data, *old*'s mark | – | cut between the two renames | compared once more, and only then finished; if *old* alone was changed since, *new* becomes *incoming*, and all begins anew |
//! | data | data, another mark or none | – | somebody else's data is on the volume | refused, both named |
//! | none, or unused | data, *left*'s mark | there | the switch is done | *old* is made, mounted; *left* erased |
//! | none, or unused | mounted on *old*, *left*'s mark | there | Docker may have used *new* since | *left* is erased |
//! | none, or unused | another mark or none | there | *left* may be the only copy | refused, both named |
//! | data | any | there | Docker wrote to the root disk again | refused, all named |
//! | none, or unused | any | – | nothing to move | nothing |
//!
//! A link in the place of *old* ([`super::link`]) is looked through: what it leads to on the same
//! filesystem counts as *old*, takes the link's place first, and is then moved like any other. A link to
//! *new* stands for no *old*.
//!
//! What is written to *old* after it was compared is not in the copy. Right after *old* has become *left*,
//! and again before *left* is erased, all dates of changes in it are looked at: if one is as late as the
//! comparison, *left* becomes *old* again, and the next run begins with comparing; or, once the switch
//! is done, *left* stays, and what was changed is named. When it begins to be erased, that is noted in
//! the place of the time, for erasing changes it, too.
//!
//! A link inside of *old* that leads out of it ([`super::inner_links`]) is refused before anything stops:
//! what is behind it would not be moved with the rest.
//!
//! "Unused" is what [`docker::storage`] says: nothing but what a daemon writes at its first start.
//! Docker cannot start meanwhile: the gate wants the mounts, and their units are not there before the
//! switch. That nothing of it runs, and nothing is mounted below *old*, is seen to by who calls.

mod moving;

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{AtFlags, Dir, XattrFlags, fgetxattr, fstat, fstatvfs, fsync, statat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::beneath;
use super::block::{DevNum, Volumes};
use super::docker::{self, Storage};
use super::inner_links::{InnerLink, inner_links};
use super::link::{self, Leads, Link};
use super::tree::{self, MARK, Progress, Usage, human};

pub use moving::{erase, migrate};

/// How the name of an old copy begins.
const LEFT: &str = ".hostagent-migrated-";

/// How the name of an unfinished copy ends.
const INCOMING: &str = ".hostagent-incoming";

/// A storage directory and where it belongs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Where Docker looks for it.
    pub directory: PathBuf,
    /// Where it belongs, on the data volume.
    pub target: PathBuf,
    /// The data volumes.
    pub volumes: Volumes,
}

/// What is on the disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// What the directory on the root disk holds, beneath whatever is mounted on it; or the directory
    /// that a link in its place leads to.
    pub old: Storage,
    /// That link.
    pub link: Option<Link>,
    /// A link in it through which a part of it is elsewhere, in words; looked for where nothing is
    /// mounted on it.
    pub outside: Option<String>,
    /// Its mark.
    pub old_mark: Option<String>,
    /// What the directory on the volume holds; none while the volume is not mounted.
    pub new: Option<Storage>,
    /// Its mark.
    pub new_mark: Option<String>,
    /// Whether there is an unfinished copy.
    pub incoming: bool,
    /// The old copy of which this volume has the new one.
    pub left: Option<Left>,
    /// Old copies of which another volume has the new one.
    pub others: Vec<String>,
}

/// An old copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Where it is.
    pub path: PathBuf,
    /// Its mark.
    pub mark: Option<String>,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// There is nothing to move.
    Nothing,
    /// Everything: copy, compare, switch.
    Copy,
    /// There is a compared copy: compare once more, switch.
    Finish,
    /// Nothing, and why.
    Refuse(String),
}

impl Place {
    fn name(&self) -> Result<CString> {
        name_of(&self.directory)
    }

    /// Where the old copy is after the switch.
    #[must_use]
    pub fn left(&self) -> PathBuf {
        let name = self.directory.file_name().unwrap_or_default().to_string_lossy();
        self.directory.with_file_name(format!("{LEFT}{name}-{}", self.volumes.key()))
    }

    /// Where the copy is made.
    #[must_use]
    pub fn incoming(&self) -> PathBuf {
        let name = self.target.file_name().unwrap_or_default().to_string_lossy();
        self.target.with_file_name(format!("{name}{INCOMING}"))
    }

    /// What is to be done with what was found.
    #[must_use]
    pub fn next(&self, found: &Found) -> Next {
        let (old, new) = (self.directory.display(), self.target.display());
        let has_data = matches!(found.old, Storage::Used(_));
        if let Some(left) = &found.left {
            let left_path = left.path.display();
            if has_data {
                return Next::Refuse(format!(
                    "{old} holds data again, although it was moved to {new} before, from which \
                     {left_path} is left; nothing is merged: move the data of {old} away"
                ));
            }
            if found.new.is_some() && (left.mark.is_none() || left.mark != found.new_mark) {
                return Next::Refuse(format!(
                    "{left_path} is what {old} held before it was moved, and {new} is not its copy; \
                     it may be all that there is: look at both, and move one of them away"
                ));
            }
            return Next::Nothing;
        }
        if !has_data {
            return Next::Nothing;
        }
        if let Some(outside) = &found.outside {
            return Next::Refuse(format!(
                "{outside}, where that would stay when {old} is moved; stop Docker, put what it leads \
                 to in the place of the link, and hostagent moves it with the rest"
            ));
        }
        match &found.new {
            None | Some(Storage::Absent | Storage::Unused) => Next::Copy,
            Some(Storage::Used(_))
                if found.old_mark.is_some() && found.old_mark == found.new_mark =>
            {
                Next::Finish
            }
            Some(Storage::Used(what)) => Next::Refuse(format!(
                "{old} on the root disk holds data, and so does {new} on {} ({what}); nothing is \
                 merged or overwritten: move one of them away",
                self.volumes
            )),
            Some(Storage::Symlink(_) | Storage::NotADirectory) => {
                Next::Refuse(format!("{new} is not a directory; move it away"))
            }
        }
    }
}

fn name_of(path: &Path) -> Result<CString> {
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    CString::new(name.as_bytes()).context("a name")
}

fn open_parent(path: &Path) -> Result<OwnedFd> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let dir = File::open(parent).with_context(|| format!("opening {}", parent.display()))?;
    Ok(dir.into())
}

/// Looks at all places. `device` is the data volume's if it is mounted: whatever is at the target's
/// path on another device is not on the volume.
pub fn look(place: &Place, device: Option<DevNum>) -> Result<Found> {
    let (above, name) = beneath::parent(&place.directory)?;
    look_in(place, above.as_fd(), &name, device)
}

fn look_in(
    place: &Place,
    above: BorrowedFd<'_>,
    name: &CStr,
    device: Option<DevNum>,
) -> Result<Found> {
    let mut old = docker::storage_at(&beneath::through(above, name), &place.directory)?;
    let old_mark = if is_dir(&old) { mark_of(above, name)? } else { None };
    let mut link = None;
    if let Storage::Symlink(_) = old {
        link = link::look(place, device)?;
        match link.as_ref().map(|link| &link.leads) {
            Some(Leads::Home) => old = Storage::Absent,
            Some(Leads::Beside(real)) => old = docker::storage(real)?,
            Some(Leads::Elsewhere(_)) | None => {}
        }
    }
    let top = match link.as_ref().map(|link| &link.leads) {
        Some(Leads::Beside(real)) => Some(real.as_path()),
        _ => is_seen(place, above, name)?.then_some(place.directory.as_path()),
    };
    let mut found = Found {
        outside: match top.filter(|_| is_dir(&old)) {
            Some(top) => outside(top, &place.directory)?,
            None => None,
        },
        old,
        link,
        old_mark,
        new: None,
        new_mark: None,
        incoming: false,
        left: None,
        others: Vec::new(),
    };
    let prefix = format!("{LEFT}{}-", name.to_string_lossy());
    let own = name_of(&place.left())?;
    let listing = || format!("listing the directory of {}", place.directory.display());
    // Through a descriptor of its own: a view of what lies beneath mounts can only be looked up in.
    let readable = super::tree::open_dir(above, c".").with_context(listing)?;
    let mut entries = Dir::new(readable).with_context(listing)?;
    while let Some(entry) = entries.read() {
        let entry = entry.with_context(listing)?;
        let entry = entry.file_name();
        if *entry == *own {
            found.left = Some(Left { path: place.left(), mark: mark_of(above, entry)? });
        } else if entry.to_bytes().starts_with(prefix.as_bytes()) {
            let path = place.directory.with_file_name(OsStr::from_bytes(entry.to_bytes()));
            found.others.push(path.display().to_string());
        }
    }
    found.others.sort();
    let Some(device) = device else { return Ok(found) };
    let above = open_volume(place, device)?;
    let name = name_of(&place.target)?;
    let new = docker::storage_at(&beneath::through(above.as_fd(), &name), &place.target)?;
    found.new_mark = if is_dir(&new) { mark_of(above.as_fd(), &name)? } else { None };
    found.new = Some(new);
    found.incoming = exists(above.as_fd(), &name_of(&place.incoming())?)?;
    Ok(found)
}

/// Whether the directory is what is seen at its path, and not hidden by a mount.
fn is_seen(place: &Place, above: BorrowedFd<'_>, name: &CStr) -> Result<bool> {
    let doing = || format!("looking at {}", place.directory.display());
    let beneath = match statat(above, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(beneath) => beneath,
        Err(Errno::NOENT) => return Ok(false),
        Err(e) => return Err(e).with_context(doing),
    };
    match std::fs::symlink_metadata(&place.directory) {
        Ok(seen) => Ok((seen.dev(), seen.ino()) == (beneath.st_dev, beneath.st_ino)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(doing),
    }
}

/// The first link in `top` that leads out of it, in words. The directory will be seen at `directory`,
/// wherever it is now: what is written in a link has to lead there.
fn outside(top: &Path, directory: &Path) -> Result<Option<String>> {
    let stays = |link: &InnerLink| {
        link.leads.as_ref().is_some_and(|(there, _)| there.starts_with(top))
            && (link.target.is_relative() || link.target.starts_with(directory))
    };
    let found = inner_links(top)?.into_iter().find(|link| !stays(link));
    Ok(found.map(|InnerLink { path, target, leads }| {
        let nowhere = if leads.is_none() { " (which leads nowhere)" } else { "" };
        format!("{} is a link to {}{nowhere}", path.display(), target.display())
    }))
}

/// The directory on the data volume in which the target is, which must be on that device.
fn open_volume(place: &Place, device: DevNum) -> Result<OwnedFd> {
    let above = open_parent(&place.target)?;
    let seen = DevNum::of(fstat(&above).context("looking at the data volume")?.st_dev);
    ensure!(
        seen == device,
        "{} is not on the data volume ({device}), but on {seen}",
        place.target.display()
    );
    Ok(above)
}

fn is_dir(storage: &Storage) -> bool {
    matches!(storage, Storage::Unused | Storage::Used(_))
}

fn exists(dir: BorrowedFd<'_>, name: &CStr) -> Result<bool> {
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e).with_context(|| format!("looking at {}", name.to_string_lossy())),
    }
}

/// The mark of a directory, if it has one.
fn mark_of(dir: BorrowedFd<'_>, name: &CStr) -> Result<Option<String>> {
    attribute(dir, name, MARK)
}

/// An attribute of hostagent's own, if a directory has it.
fn attribute(dir: BorrowedFd<'_>, name: &CStr, attribute: &str) -> Result<Option<String>> {
    let doing = || format!("reading the mark of {}", name.to_string_lossy());
    let fd = tree::open_dir(dir, name).with_context(doing)?;
    let mut value = [0; 64];
    match fgetxattr(&fd, attribute, &mut value[..]) {
        Ok(length) => Ok(Some(String::from_utf8_lossy(&value[..length]).into_owned())),
        // No mark, or a filesystem that cannot have one.
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e).with_context(doing),
    }
}

fn set_mark(dir: &OwnedFd, mark: &str) -> Result<()> {
    set_attribute(dir, MARK, mark)
}

fn set_attribute(dir: &OwnedFd, attribute: &str, value: &str) -> Result<()> {
    rustix::fs::fsetxattr(dir, attribute, value.as_bytes(), XattrFlags::empty())
        .context("marking a directory")?;
    fsync(dir).context("flushing a mark")
}

/// A mark that nothing else has.
fn new_mark() -> Result<String> {
    let mut bytes = [0; 16];
    let mut source = File::open("/dev/urandom").context("opening /dev/urandom")?;
    source.read_exact(&mut bytes).context("reading /dev/urandom")?;
    Ok(uuid::Uuid::from_bytes(bytes).to_string())
}

/// What is needed and what there is on a filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// What has to fit; perhaps more than that, where less was not worth finding out.
    pub needed: Usage,
    /// What is free.
    pub free: Usage,
}

impl Space {
    /// What is missing, in a few words, if it does not fit with something to spare.
    #[must_use]
    pub fn lacks(&self) -> Option<String> {
        // A copy takes a little more where directories and extents fall otherwise.
        let bytes = self.needed.bytes + self.needed.bytes / 20 + (64 << 20);
        let inodes = self.needed.inodes + 1000;
        if bytes > self.free.bytes {
            let (bytes, free) = (human(bytes), human(self.free.bytes));
            return Some(format!("{bytes} would be needed, to be safe, and {free} are free"));
        }
        (inodes > self.free.inodes)
            .then(|| format!("{inodes} inodes would be needed, and {} are free", self.free.inodes))
    }
}

/// What is free on the filesystem of a directory, for root and everybody else.
fn free(dir: BorrowedFd<'_>) -> Result<Usage> {
    let stat = fstatvfs(dir).context("asking for free space")?;
    // A filesystem that makes inodes as it needs them has none to count.
    let inodes = if stat.f_files == 0 { u64::MAX } else { stat.f_favail };
    Ok(Usage { bytes: stat.f_bavail.saturating_mul(stat.f_frsize), inodes })
}

/// Whether all these directories fit on the volume together. First by what their filesystem holds
/// altogether, which costs nothing; only if that is too much they are measured.
pub fn space(places: &[&Place], device: DevNum) -> Result<Space> {
    let first = places.first().context("nothing is to be moved")?;
    let above = open_volume(first, device)?;
    let mut space = Space { needed: Usage::default(), free: free(above.as_fd())? };
    let progress = Progress::default();
    for place in places {
        // What an unfinished copy takes will be free.
        match tree::open_dir(above.as_fd(), &name_of(&place.incoming())?) {
            Ok(dir) => space.free = space.free.plus(tree::measure(dir, &progress)?),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e).context("looking at an unfinished copy"),
        }
    }
    let old = open_parent(&first.directory)?;
    let stat = fstatvfs(&old).context("asking for used space")?;
    space.needed = Usage {
        bytes: (stat.f_blocks - stat.f_bfree).saturating_mul(stat.f_frsize),
        inodes: stat.f_files - stat.f_ffree,
    };
    if space.lacks().is_none() {
        return Ok(space);
    }
    space.needed = Usage::default();
    for place in places {
        let path = place.directory.canonicalize();
        let path = path.with_context(|| format!("opening {}", place.directory.display()))?;
        let old = open_parent(&path)?;
        let dir = tree::open_dir(old.as_fd(), &name_of(&path)?)
            .with_context(|| format!("opening {}", path.display()))?;
        space.needed = space.needed.plus(tree::measure(dir, &progress)?);
    }
    Ok(space)
}

#[cfg(test)]
mod tests;
