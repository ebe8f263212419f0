//! Copies a tree into an empty directory.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{
    self, Advice, AtFlags, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat, fstat,
};
use rustix::io::Errno;

use super::node::{self, Node, kind};
use super::walk::{Visit, Walk};
use super::{CHUNK, FLUSH_EVERY, Progress};

/// Copies what is under `source`, and what is kept of it itself, to the empty directory `target`.
/// What is made is closed to everybody but root until it is complete. Nothing is flushed.
pub fn copy(source: OwnedFd, target: OwnedFd, progress: &Progress) -> Result<()> {
    let top = target.try_clone().context("using the target")?;
    let mut copying = Copying { top, links: HashMap::new(), buffer: vec![0; CHUNK], progress };
    let mut targets = vec![target];
    let mut walk = Walk::new(source)?;
    while let Some(visit) = walk.next()? {
        progress.tick()?;
        let target = targets.last().context("the walk left its tree")?;
        match visit {
            Visit::Entry(name, stat) if kind(&stat) == FileType::Directory => {
                let doing = || format!("copying the directory {}", walk.shown());
                fs::mkdirat(target, &*name, Mode::RWXU).with_context(doing)?;
                let made = super::open_dir(target.as_fd(), &name).with_context(doing)?;
                targets.push(made);
                walk.enter(&name, &stat)?;
            }
            Visit::Entry(name, stat) => {
                let doing = || format!("copying {}", walk.shown());
                copying
                    .entry(walk.fd()?, target.as_fd(), &name, &stat, walk.path())
                    .with_context(doing)?;
            }
            Visit::Leave => {
                let doing = || format!("copying the directory {}", walk.shown());
                let fd = walk.fd()?;
                let stat = fstat(fd).with_context(doing)?;
                let meta = Node::Open(fd).meta(&stat).with_context(doing)?;
                Node::Open(target.as_fd()).apply(&meta).with_context(doing)?;
                targets.pop();
            }
        }
    }
    Ok(())
}

struct Copying<'a> {
    top: OwnedFd,
    /// Files of which not all links were met yet: where their copy is, and how many are missing.
    links: HashMap<u64, (Vec<u8>, u64)>,
    buffer: Vec<u8>,
    progress: &'a Progress,
}

impl Copying<'_> {
    fn entry(
        &mut self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        name: &CStr,
        stat: &Stat,
        path: &[u8],
    ) -> Result<()> {
        if stat.st_nlink > 1 {
            if let Some((first, missing)) = self.links.get_mut(&stat.st_ino) {
                link(self.top.as_fd(), first, target, name).context("linking it")?;
                *missing -= 1;
                if *missing == 0 {
                    self.links.remove(&stat.st_ino);
                }
                return Ok(());
            }
            self.links.insert(stat.st_ino, (path.to_vec(), node::wide(stat.st_nlink) - 1));
        }
        match kind(stat) {
            FileType::RegularFile => return self.file(source, target, name, stat),
            FileType::Symlink => {
                let leads_to = fs::readlinkat(source, name, Vec::new()).context("reading it")?;
                fs::symlinkat(&*leads_to, target, name).context("making it")?;
            }
            kind @ (FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Fifo
            | FileType::Socket) => {
                let mode = Mode::RUSR | Mode::WUSR;
                fs::mknodat(target, name, kind, mode, stat.st_rdev).context("making it")?;
            }
            other => bail!("it is of the type {other:?}"),
        }
        let meta = Node::Named(source, name).meta(stat)?;
        Node::Named(target, name).apply(&meta)
    }

    fn file(
        &mut self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        name: &CStr,
        seen: &Stat,
    ) -> Result<()> {
        let from = node::open(source, name, OFlags::RDONLY).context("opening it")?;
        let stat = fstat(&from).context("looking at it")?;
        ensure!(stat.st_ino == seen.st_ino && stat.st_dev == seen.st_dev, "it changed meanwhile");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let to = node::open(target, name, flags).context("making it")?;
        self.content(from.as_fd(), to.as_fd(), u64::try_from(stat.st_size)?)?;
        let meta = Node::Open(from.as_fd()).meta(&stat)?;
        Node::Open(to.as_fd()).apply(&meta)
    }

    /// Copies the data between the holes.
    fn content(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> Result<()> {
        fs::ftruncate(to, size).context("setting its size")?;
        let (mut at, mut flushed) = (0, 0);
        while let Some(data) = next_data(from, at)?.filter(|data| *data < size) {
            at = data;
            let end = fs::seek(from, SeekFrom::Hole(at)).context("looking for holes")?.min(size);
            while at < end {
                let wanted = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                let read = rustix::io::pread(from, &mut self.buffer[..wanted], at);
                let read = retry(read).context("reading it")?;
                let Some(read) = read else { continue };
                ensure!(read > 0, "it became shorter while it was read");
                let mut written = 0;
                while written < read {
                    let place = at + written as u64;
                    let more = rustix::io::pwrite(to, &self.buffer[written..read], place);
                    written += retry(more).context("writing it")?.unwrap_or(0);
                }
                at += read as u64;
                self.progress.add(read)?;
                if at - flushed >= FLUSH_EVERY {
                    flushed = at;
                    fs::fdatasync(to).context("flushing it")?;
                    // Only hints: what was copied is not needed again soon.
                    let _ = fs::fadvise(to, 0, None, Advice::DontNeed);
                    let _ = fs::fadvise(from, 0, None, Advice::DontNeed);
                }
            }
        }
        Ok(())
    }
}

/// Where the next data begins at or after a place; none if only a hole is left.
pub(super) fn next_data(file: BorrowedFd<'_>, at: u64) -> Result<Option<u64>> {
    match fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(e).context("looking for holes"),
    }
}

/// None when a signal came between, and it has to be done again.
pub(super) fn retry(result: rustix::io::Result<usize>) -> rustix::io::Result<Option<usize>> {
    match result {
        Ok(length) => Ok(Some(length)),
        Err(Errno::INTR) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Makes one more link to the file at `first`, a path under `top`.
fn link(top: BorrowedFd<'_>, first: &[u8], target: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let (dir, file) = match first.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&first[..slash], &first[slash + 1..]),
        None => (&b"."[..], first),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    let dir = fs::openat2(top, dir, flags, Mode::empty(), resolve)
        .context("opening the directory of its first link")?;
    let file = CString::new(file).context("the name of its first link")?;
    match fs::linkat(&dir, &*file, target, name, AtFlags::empty()) {
        // Nothing links to what is immutable or can only grow.
        Err(Errno::PERM) => {}
        result => return Ok(result?),
    }
    let fd = node::open(dir.as_fd(), &file, OFlags::RDONLY)?;
    let flags = node::flags(fd.as_fd())?;
    node::unlock(fd.as_fd())?;
    fs::linkat(&dir, &*file, target, name, AtFlags::empty())?;
    fs::ioctl_setflags(&fd, flags).context("setting its attributes (chattr)")
}
