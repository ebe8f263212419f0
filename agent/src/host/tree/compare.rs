//! Compares a tree with its copy: everything that is kept, and every byte.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result};
use rustix::fs::{self, Advice, AtFlags, Dir, FileType, OFlags, SeekFrom, Stat, fstat, statat};
use rustix::io::Errno;

use super::copy::{next_data, retry};
use super::node::{self, Node, kind};
use super::walk::{Visit, Walk};
use super::{CHUNK, Progress};

/// By how much a stretch of data may be longer in the copy, where holes are of another grain.
const GRAIN: u64 = 128 << 10;

/// The first thing that is not the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Where, relative to the tops, as the filesystem has it; empty for the tops themselves.
    pub path: Vec<u8>,
    /// What is not the same there.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", node::shown(&self.path), self.what)
    }
}

/// What a comparison of two trees that are alike noticed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Alike {
    /// A file of the tree that has a further link outside of it, if there is one.
    pub linked_outside: Option<String>,
}

/// Compares the tree under `source` with the one under `copy`. What cannot be compared is an error.
pub fn compare(
    source: OwnedFd,
    copy: OwnedFd,
    progress: &Progress,
) -> Result<Result<Alike, Difference>> {
    let mut comparing = Comparing {
        links: HashMap::new(),
        copies: HashMap::new(),
        buffers: (vec![0; CHUNK], vec![0; CHUNK]),
        progress,
    };
    let mut walk = Walk::new(source)?;
    let mut levels = vec![Level { dir: copy, entries: 0 }];
    let differs = |path: &[u8], what: String| Ok(Err(Difference { path: path.to_vec(), what }));
    while let Some(visit) = walk.next()? {
        progress.tick()?;
        let level = levels.last_mut().context("the walk left its tree")?;
        let doing = || format!("comparing {}", walk.shown());
        match visit {
            Visit::Entry(name, stat) => {
                level.entries += 1;
                let other = match statat(&level.dir, &*name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(other) => other,
                    Err(Errno::NOENT) => {
                        return differs(walk.path(), "it is missing in the copy".into());
                    }
                    Err(e) => return Err(e).with_context(doing),
                };
                let (source, copy) = (walk.fd()?, level.dir.as_fd());
                let what = if kind(&stat) == kind(&other) {
                    comparing
                        .entry((source, &stat), (copy, &other), &name, walk.path())
                        .with_context(doing)?
                } else {
                    let (here, there) = (kind(&stat), kind(&other));
                    Some(format!("its type is {here:?}, and the copy's is {there:?}"))
                };
                if let Some(what) = what {
                    return differs(walk.path(), what);
                }
                if kind(&stat) == FileType::Directory {
                    let dir = super::open_dir(copy, &name).with_context(doing)?;
                    walk.enter(&name, &stat)?;
                    levels.push(Level { dir, entries: 0 });
                }
            }
            Visit::Leave => {
                if let Some(name) = surplus(walk.fd()?, level).with_context(doing)? {
                    let mut path = walk.path().to_vec();
                    if !path.is_empty() {
                        path.push(b'/');
                    }
                    path.extend_from_slice(&name);
                    return differs(&path, "it is in the copy only".into());
                }
                let (source, copy) = (walk.fd()?, level.dir.as_fd());
                let here = Node::Open(source).meta(&fstat(source)?).with_context(doing)?;
                let there = Node::Open(copy).meta(&fstat(copy)?).with_context(doing)?;
                if let Some(what) = here.difference(&there) {
                    return differs(walk.path(), what);
                }
                levels.pop();
            }
        }
    }
    Ok(comparing.finish())
}

struct Level {
    dir: OwnedFd,
    /// How many entries the source has here.
    entries: usize,
}

/// The name of an entry that only the copy has, if there is one.
fn surplus(source: BorrowedFd<'_>, level: &Level) -> Result<Option<Vec<u8>>> {
    let mut names = Dir::read_from(&level.dir)?;
    let mut entries = 0;
    while let Some(entry) = names.read() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        entries += 1;
        // Looked up only where there are too many: else every one has been met.
        if entries > level.entries {
            let mut names = Dir::read_from(&level.dir)?;
            while let Some(entry) = names.read() {
                let entry = entry?;
                let name = entry.file_name();
                match statat(source, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => return Ok(Some(name.to_bytes().to_vec())),
                    Err(e) => return Err(e.into()),
                    Ok(_) => {}
                }
            }
            anyhow::bail!("the directory changed meanwhile");
        }
    }
    Ok(None)
}

/// What is known of a file with several links.
struct Links {
    first: Vec<u8>,
    copy: u64,
    met: u64,
    here: u64,
    there: u64,
}

struct Comparing<'a> {
    /// By the inode in the source.
    links: HashMap<u64, Links>,
    /// From the inode in the copy to the one in the source.
    copies: HashMap<u64, u64>,
    buffers: (Vec<u8>, Vec<u8>),
    progress: &'a Progress,
}

impl Comparing<'_> {
    fn entry(
        &mut self,
        (source, stat): (BorrowedFd<'_>, &Stat),
        (copy, other): (BorrowedFd<'_>, &Stat),
        name: &std::ffi::CStr,
        path: &[u8],
    ) -> Result<Option<String>> {
        if kind(stat) == FileType::Directory {
            // Its attributes are compared when it is left, its name was found: enough for now.
            return Ok(None);
        }
        if stat.st_nlink > 1 || other.st_nlink > 1 {
            if *self.copies.entry(other.st_ino).or_insert(stat.st_ino) != stat.st_ino {
                return Ok(Some("the copy is linked with the copy of another file".into()));
            }
            let links = self.links.entry(stat.st_ino).or_insert_with(|| Links {
                first: path.to_vec(),
                copy: other.st_ino,
                met: 0,
                here: node::wide(stat.st_nlink),
                there: node::wide(other.st_nlink),
            });
            links.met += 1;
            if links.copy != other.st_ino {
                let first = node::shown(&links.first);
                return Ok(Some(format!("it is linked with {first}, and the copy is not")));
            }
            if links.met > 1 {
                // The very file that was compared at its first link.
                return Ok(None);
            }
        }
        match kind(stat) {
            FileType::RegularFile => self.file(source, copy, name),
            kind => {
                let here = Node::Named(source, name).meta(stat)?;
                let there = Node::Named(copy, name).meta(other)?;
                if let Some(what) = here.difference(&there) {
                    return Ok(Some(what));
                }
                if kind == FileType::Symlink {
                    let here = fs::readlinkat(source, name, Vec::new())?;
                    let there = fs::readlinkat(copy, name, Vec::new())?;
                    return Ok((here != there)
                        .then(|| format!("it leads to {here:?}, and the copy to {there:?}")));
                }
                Ok(None)
            }
        }
    }

    fn file(
        &mut self,
        source: BorrowedFd<'_>,
        copy: BorrowedFd<'_>,
        name: &std::ffi::CStr,
    ) -> Result<Option<String>> {
        let here = node::open(source, name, OFlags::RDONLY).context("opening it")?;
        let there = node::open(copy, name, OFlags::RDONLY).context("opening the copy")?;
        let (stat, other) = (fstat(&here)?, fstat(&there)?);
        let meta = Node::Open(here.as_fd()).meta(&stat)?;
        let copied = Node::Open(there.as_fd()).meta(&other)?;
        if let Some(what) = meta.difference(&copied) {
            return Ok(Some(what));
        }
        if stat.st_size != other.st_size {
            let (a, b) = (stat.st_size, other.st_size);
            return Ok(Some(format!("it has {a} bytes, and the copy {b}")));
        }
        self.content(here.as_fd(), there.as_fd(), u64::try_from(stat.st_size)?)
    }

    fn content(
        &mut self,
        here: BorrowedFd<'_>,
        there: BorrowedFd<'_>,
        size: u64,
    ) -> Result<Option<String>> {
        // What was flushed is read from the disk, not from memory.
        let _ = fs::fadvise(there, 0, None, Advice::DontNeed);
        let (data, stretches) = data(here, size)?;
        let copied = self::data(there, size)?.0;
        if copied > data + stretches * GRAIN {
            return Ok(Some(format!("it holds {data} bytes beside holes, and the copy {copied}")));
        }
        let mut at = 0;
        // Where one has data, both are read: a hole reads as zeros.
        while let Some(start) = earliest(next_data(here, at)?, next_data(there, at)?) {
            at = start;
            if at >= size {
                break;
            }
            let wanted = usize::try_from(size - at).unwrap_or(CHUNK).min(CHUNK);
            let one = fill(here, &mut self.buffers.0[..wanted], at).context("reading it")?;
            let two = fill(there, &mut self.buffers.1[..wanted], at).context("reading the copy")?;
            anyhow::ensure!(one == wanted && two == wanted, "it became shorter meanwhile");
            if self.buffers.0[..wanted] != self.buffers.1[..wanted] {
                let pairs = self.buffers.0.iter().zip(&self.buffers.1);
                let place = at + pairs.take_while(|(a, b)| a == b).count() as u64;
                return Ok(Some(format!("its content differs from byte {place} on")));
            }
            at += wanted as u64;
            self.progress.add(wanted)?;
        }
        let _ = fs::fadvise(here, 0, None, Advice::DontNeed);
        let _ = fs::fadvise(there, 0, None, Advice::DontNeed);
        Ok(None)
    }

    /// Of the copy every link must be in the tree. Of the source one may be outside.
    fn finish(self) -> Result<Alike, Difference> {
        let mut alike = Alike::default();
        for links in self.links.into_values() {
            if links.met != links.there {
                let (met, there) = (links.met, links.there);
                let what = format!("it has {met} links here, and its copy has {there}");
                return Err(Difference { path: links.first, what });
            }
            if links.met < links.here {
                alike.linked_outside = Some(node::shown(&links.first));
            }
        }
        Ok(alike)
    }
}

fn earliest(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// How many bytes a file holds beside its holes, and in how many stretches.
fn data(file: BorrowedFd<'_>, size: u64) -> Result<(u64, u64)> {
    let (mut bytes, mut stretches, mut at) = (0, 0, 0);
    while let Some(start) = next_data(file, at)?.filter(|start| *start < size) {
        at = fs::seek(file, SeekFrom::Hole(start)).context("looking for holes")?.min(size);
        bytes += at - start;
        stretches += 1;
    }
    Ok((bytes, stretches))
}

/// Reads until the buffer is full or the file ends.
fn fill(file: BorrowedFd<'_>, buffer: &mut [u8], at: u64) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        let read = rustix::io::pread(file, &mut buffer[filled..], at + filled as u64);
        match retry(read)? {
            Some(0) => break,
            Some(length) => filled += length,
            None => {}
        }
    }
    Ok(filled)
}
