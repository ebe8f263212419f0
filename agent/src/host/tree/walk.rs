//! The one way in which a tree is walked: level by level through opened directories.

use std::ffi::{CStr, CString};
use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{AtFlags, Dir, OFlags, Stat, fstat, statat};

use super::node;

/// A walk over a tree, depth first, in the order in which directories list their entries.
pub(super) struct Walk {
    levels: Vec<Level>,
    /// The path of what was visited last, relative to the top.
    path: Vec<u8>,
    leaving: bool,
}

struct Level {
    dir: Dir,
    /// Its name in the level above; empty for the top.
    name: CString,
    /// The length of the path up to here.
    length: usize,
}

/// What a walk comes by.
pub(super) enum Visit {
    /// An entry of the current directory. A directory is walked only if it is [entered](Walk::enter).
    Entry(CString, Stat),
    /// The end of the current directory, which is still open.
    Leave,
}

impl Walk {
    pub(super) fn new(top: OwnedFd) -> Result<Self> {
        let dir = Dir::new(top).context("reading a directory")?;
        let level = Level { dir, name: CString::default(), length: 0 };
        Ok(Self { levels: vec![level], path: Vec::new(), leaving: false })
    }

    /// The next thing on the way; none after the top was left.
    pub(super) fn next(&mut self) -> Result<Option<Visit>> {
        if std::mem::take(&mut self.leaving) {
            self.levels.pop();
        }
        loop {
            let Some(level) = self.levels.last_mut() else { return Ok(None) };
            self.path.truncate(level.length);
            let Some(entry) = level.dir.read() else {
                self.leaving = true;
                return Ok(Some(Visit::Leave));
            };
            let entry = entry.with_context(|| format!("reading {}", node::shown(&self.path)))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.to_bytes());
            let name = name.to_owned();
            let stat = statat(self.fd()?, &*name, AtFlags::SYMLINK_NOFOLLOW)
                .with_context(|| format!("looking at {}", self.shown()))?;
            return Ok(Some(Visit::Entry(name, stat)));
        }
    }

    /// Goes into a directory that was just visited.
    pub(super) fn enter(&mut self, name: &CStr, seen: &Stat) -> Result<()> {
        let doing = || format!("opening the directory {}", node::shown(&self.path));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = node::open(self.fd()?, name, flags).with_context(doing)?;
        let stat = fstat(&fd).with_context(doing)?;
        ensure!(
            stat.st_ino == seen.st_ino && stat.st_dev == seen.st_dev,
            "{} changed while it was looked at",
            self.shown()
        );
        let dir = Dir::new(fd).with_context(doing)?;
        self.levels.push(Level { dir, name: name.to_owned(), length: self.path.len() });
        Ok(())
    }

    /// Lists the current directory once more, from its beginning; instead of leaving it.
    pub(super) fn again(&mut self) {
        self.leaving = false;
        if let Some(level) = self.levels.last_mut() {
            level.dir.rewind();
        }
    }

    /// The current directory.
    pub(super) fn fd(&self) -> Result<BorrowedFd<'_>> {
        let level = self.levels.last().context("the walk is over")?;
        level.dir.fd().context("using a directory")
    }

    /// The directory above the current one, and the current one's name in it; none at the top.
    pub(super) fn parent(&self) -> Result<Option<(BorrowedFd<'_>, &CStr)>> {
        let [.., above, level] = &self.levels[..] else { return Ok(None) };
        Ok(Some((above.dir.fd().context("using a directory")?, &level.name)))
    }

    /// The path of what was visited last, relative to the top; empty for the top itself.
    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// The same for people.
    pub(super) fn shown(&self) -> String {
        node::shown(&self.path)
    }
}
