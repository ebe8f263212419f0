//! Disk images as seen from outside the instance: made, hashed, searched. What the guest says of
//! its disks is one thing; what really stands on them is another.

use crate::command::run;
use anyhow::{Context as _, Result};
use nix::unistd::{Whence, lseek};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

/// How much is looked at in one go.
const CHUNK: usize = 1 << 20;

/// Makes an empty sparse disk.
pub fn create(path: &Path, gibibytes: u32) -> Result<()> {
    File::create(path)
        .and_then(|file| file.set_len(u64::from(gibibytes) << 30))
        .with_context(|| format!("creating the disk {}", path.display()))
}

/// A hash of what a disk holds: of every chunk that is not all zeros, with its place. Disks are
/// mostly holes, over which this goes as fast as they can be read.
pub fn hash(path: &Path) -> Result<String> {
    let zeros = vec![0; CHUNK];
    let mut hash = Sha256::new();
    let mut place: u64 = 0;
    scan(path, |chunk| {
        if chunk != &zeros[..chunk.len()] {
            hash.update(place.to_le_bytes());
            hash.update(chunk);
        }
        place += chunk.len() as u64;
        true
    })?;
    hash.update(place.to_le_bytes());
    Ok(hex(&hash.finalize()))
}

/// The SHA-256 of a file, as `sha256sum` says it.
pub fn sha256(path: &Path) -> Result<String> {
    let line = run(Command::new("sha256sum").arg("--").arg(path))?;
    Ok(line.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Bytes as hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Whether some bytes stand anywhere in a disk image. In a qcow2 file too, for its clusters are
/// neither compressed nor encrypted; what spans two of them is missed. Not for needles with zeros.
pub fn contains(path: &Path, needle: &[u8]) -> Result<bool> {
    let mut found = false;
    let mut window: Vec<u8> = Vec::new();
    let zeros = vec![0; CHUNK];
    scan(path, |chunk| {
        if chunk == &zeros[..chunk.len()] {
            window.clear();
            return true;
        }
        window.extend_from_slice(chunk);
        found = find(&window, needle);
        let keep = window.len().min(needle.len().saturating_sub(1));
        window.drain(..window.len() - keep);
        !found
    })?;
    Ok(found)
}

/// Whether `needle` stands in `hay`. Looks for the first byte first: disks are mostly zeros.
fn find(hay: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return true };
    let mut rest = hay;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

/// Reads a file in chunks until `each` has seen enough. Chunks within holes are not read.
fn scan(path: &Path, mut each: impl FnMut(&[u8]) -> bool) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let length = file.metadata().with_context(|| format!("looking at {}", path.display()))?.len();
    let zeros = vec![0; CHUNK];
    let mut chunk = Vec::with_capacity(CHUNK);
    let mut place = 0;
    loop {
        // Where the next data is; at the end there is none (ENXIO).
        let data = match lseek(&file, i64::try_from(place)?, Whence::SeekData) {
            Ok(data) => u64::try_from(data)?,
            Err(nix::errno::Errno::ENXIO) => length,
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        while place + (CHUNK as u64) <= data {
            place += CHUNK as u64;
            if !each(&zeros) {
                return Ok(());
            }
        }
        lseek(&file, i64::try_from(place)?, Whence::SeekSet)?;
        chunk.clear();
        (&file)
            .take(CHUNK as u64)
            .read_to_end(&mut chunk)
            .with_context(|| format!("reading {}", path.display()))?;
        if chunk.is_empty() || !each(&chunk) {
            return Ok(());
        }
        place += chunk.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_spans_two_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut content = vec![0; CHUNK - 3];
        content.extend_from_slice(b"canary");
        std::fs::write(&path, content).unwrap();
        assert!(contains(&path, b"canary").unwrap());
        assert!(!contains(&path, b"canaries").unwrap());
    }

    #[test]
    fn holes_are_zeros() {
        use std::os::unix::fs::FileExt as _;
        let dir = tempfile::tempdir().unwrap();
        let (sparse, full) = (dir.path().join("sparse"), dir.path().join("full"));
        let mut content = vec![0; 9 * CHUNK + 77];
        content[5 * CHUNK + 4321] = 1;
        std::fs::write(&full, &content).unwrap();
        let file = File::create(&sparse).unwrap();
        file.set_len(content.len() as u64).unwrap();
        assert_ne!(hash(&sparse).unwrap(), hash(&full).unwrap());
        file.write_all_at(&[1], 5 * CHUNK as u64 + 4321).unwrap();
        assert_eq!(hash(&sparse).unwrap(), hash(&full).unwrap());
        assert!(contains(&sparse, &[1]).unwrap());
    }

    #[test]
    fn a_hash_tells_what_moved() {
        let dir = tempfile::tempdir().unwrap();
        let hash_of = |content: &[u8]| {
            let path = dir.path().join("disk");
            std::fs::write(&path, content).unwrap();
            hash(&path).unwrap()
        };
        let mut content = vec![0; 3 * CHUNK];
        let empty = hash_of(&content);
        assert_ne!(empty, hash_of(&content[1..]), "a shorter disk");
        content[5] = 1;
        let first = hash_of(&content);
        content.rotate_right(CHUNK);
        assert_ne!(first, hash_of(&content), "the same chunk in another place");
        assert_ne!(first, empty);
    }
}
