//! The lines of `/proc/PID/mountinfo` (proc(5)) as far as a container's mounts matter. Not by the
//! crate `procfs`, which keeps one option of each name and leaves paths escaped.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Role;
use crate::host::block::DevNum;
use crate::host::mounts::Mount;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) device: DevNum,
    /// The directory of the filesystem that is mounted.
    pub(super) root: PathBuf,
    pub(super) mount_point: PathBuf,
    pub(super) fs_type: String,
    /// What was mounted, in the filesystem's own words.
    pub(super) source: String,
    pub(super) read_only: bool,
    /// The filesystem's options, in their order.
    options: Vec<(String, Vec<u8>)>,
}

pub(super) fn parse(text: &[u8]) -> Result<Vec<Line>> {
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Result<Line> {
    let doing = || format!("reading the mount {:?}", String::from_utf8_lossy(line));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut words = line.split(|byte| *byte == b' ');
    let mut word = || words.next().with_context(doing);
    let (_, _) = (word()?, word()?);
    let device = DevNum::parse(&text(word()?)).with_context(doing)?;
    let (root, mount_point) = (path(word()?), path(word()?));
    let is_read_only = |options: &[u8]| options.split(|byte| *byte == b',').any(|o| o == b"ro");
    let read_only = is_read_only(word()?);
    while word()? != b"-" {}
    let (fs_type, source) = (text(word()?), text(&unescape(word()?)));
    let options = word()?;
    Ok(Line {
        device,
        root,
        mount_point,
        fs_type,
        source,
        read_only: read_only || is_read_only(options),
        options: split_options(options),
    })
}

/// The options of a filesystem: separated by commas, but for those that are escaped, as a comma in a
/// path of an overlay's is.
fn split_options(text: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut options = Vec::new();
    for option in split_unescaped(&unescape(text), b',') {
        let (name, value) = match option.iter().position(|byte| *byte == b'=') {
            Some(at) => (&option[..at], option[at + 1..].to_vec()),
            None => (&option[..], Vec::new()),
        };
        options.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    options
}

impl Line {
    /// The directories that an overlay is made of, as they were given (kernel documentation,
    /// filesystems/overlayfs): lower ones are separated by colons, or given one by one.
    pub(super) fn overlay_directories(&self) -> Vec<(Role, PathBuf)> {
        let mut found = Vec::new();
        for (name, value) in &self.options {
            let plain = |bytes: &[u8]| PathBuf::from(OsString::from_vec(unslash(bytes)));
            match name.as_str() {
                "upperdir" => found.push((Role::Upper, plain(value))),
                "workdir" => found.push((Role::Work, plain(value))),
                "lowerdir+" | "datadir+" => found.push((Role::Lower, plain(value))),
                "lowerdir" => {
                    // Two colons stand before layers that hold data only.
                    let lower = split_unescaped(value, b':').into_iter().filter(|p| !p.is_empty());
                    found.extend(lower.map(|path| (Role::Lower, plain(&path))));
                }
                _ => {}
            }
        }
        found
    }

    /// Where a directory of this overlay may be. An absolute path is there. With many layers, Docker
    /// and containerd give them relative to a directory that the kernel does not tell: the one that
    /// holds the layers (Docker: `overlay2`; containerd: `snapshots`, in which the writable layer is
    /// two levels down). Docker's holds the place where the overlay is mounted on the host, too.
    pub(super) fn candidates(&self, path: &Path, host: &[Mount]) -> Vec<PathBuf> {
        if path.is_absolute() {
            return vec![path.to_path_buf()];
        }
        let upper = self.overlay_directories().into_iter().find(|(role, _)| *role == Role::Upper);
        let above = upper.and_then(|(_, upper)| Some(upper.parent()?.parent()?.to_path_buf()));
        match above.filter(|above| above.is_absolute()) {
            Some(above) => vec![above.join(path)],
            None => host
                .iter()
                .filter(|mount| mount.device == self.device)
                .filter_map(|mount| Path::new(&mount.mount_point).parent()?.parent())
                .map(|above| above.join(path))
                .collect(),
        }
    }
}

fn path(word: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(word)))
}

/// Undoes the kernel's escapes: a backslash and three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|d| d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match digits {
            Some(digits) if byte == b'\\' => {
                let code = digits.iter().fold(0u32, |code, b| code * 8 + u32::from(b - b'0'));
                plain.push(u8::try_from(code).unwrap_or(b'?'));
                rest = &after[3..];
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    plain
}

/// Splits at a separator that no backslash stands before; the backslashes stay.
fn split_unescaped(text: &[u8], separator: u8) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter();
    while let Some(&byte) = bytes.next() {
        if byte == separator {
            parts.push(Vec::new());
            continue;
        }
        let last = parts.last_mut().expect("never empty");
        last.push(byte);
        if byte == b'\\' {
            last.extend(bytes.next());
        }
    }
    parts
}

/// Removes the backslashes that stand before other bytes.
fn unslash(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut bytes = text.iter();
    while let Some(&byte) = bytes.next() {
        plain.push(if byte == b'\\' { *bytes.next().unwrap_or(&byte) } else { byte });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Line {
        parse(text.as_bytes()).unwrap().remove(0)
    }

    fn directories(options: &str) -> Vec<(Role, String)> {
        let line = one(&format!("1 2 0:50 / / rw - overlay overlay {options}"));
        let dirs = line.overlay_directories().into_iter();
        dirs.map(|(role, path)| (role, path.display().to_string())).collect()
    }

    #[test]
    fn a_mount_is_read_with_its_escapes() {
        let line = one(
            "36 35 254:1 /srv/my\\040records /a\\134b ro,relatime master:1 shared:2 - ext4 /dev/vda1 rw",
        );
        assert_eq!(line.device, DevNum { major: 254, minor: 1 });
        assert_eq!(line.root, Path::new("/srv/my records"));
        assert_eq!(line.mount_point, Path::new("/a\\b"));
        assert_eq!((line.fs_type.as_str(), line.source.as_str()), ("ext4", "/dev/vda1"));
        assert!(line.read_only);
        assert!(!one("1 2 0:5 / /x rw - nfs4 server:/e rw,vers=4.2").read_only);
        assert!(one("1 2 0:5 / /x rw - ext4 /dev/vdb ro").read_only);
        for bad in
            ["nonsense", "1 2 x / / rw - ext4 a b", "1 2 8:1 / / rw ext4", "1 2 8:1 / / rw - ext4"]
        {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse(b"").unwrap().is_empty());
    }

    #[test]
    fn every_directory_of_an_overlay_is_found() {
        use Role::{Lower, Upper, Work};
        let of = |list: &[(Role, &str)]| -> Vec<(Role, String)> {
            list.iter().map(|(role, path)| (*role, (*path).to_owned())).collect()
        };
        // As Docker 26.1 and containerd 1.7 mount it, and as Linux 6.8 shows layers given one by one.
        let table = [
            (
                "rw,lowerdir=/o/l/A:/o/l/B,upperdir=/o/x/diff,workdir=/o/x/work,index=off",
                of(&[
                    (Lower, "/o/l/A"),
                    (Lower, "/o/l/B"),
                    (Upper, "/o/x/diff"),
                    (Work, "/o/x/work"),
                ]),
            ),
            ("ro,lowerdir=/a::/data", of(&[(Lower, "/a"), (Lower, "/data")])),
            (
                "rw,lowerdir+=/a,lowerdir+=/b,datadir+=/c",
                of(&[(Lower, "/a"), (Lower, "/b"), (Lower, "/c")]),
            ),
            // A colon, a comma and a space in names.
            (
                "rw,lowerdir=/a\\134:b:/c,upperdir=/d\\134,e\\040f",
                of(&[(Lower, "/a:b"), (Lower, "/c"), (Upper, "/d,e f")]),
            ),
            ("rw", vec![]),
        ];
        for (options, expected) in table {
            assert_eq!(directories(options), expected, "{options}");
        }
    }

    #[test]
    fn relative_directories_are_looked_for_where_the_layers_are() {
        let line = one(
            "1 2 0:50 / / rw - overlay overlay rw,lowerdir=4/fs:3/fs,upperdir=/c/snapshots/5/fs",
        );
        assert_eq!(line.candidates(Path::new("4/fs"), &[]), [Path::new("/c/snapshots/4/fs")]);
        assert_eq!(line.candidates(Path::new("/x"), &[]), [Path::new("/x")]);
        let line = one("1 2 0:50 / / rw - overlay overlay rw,lowerdir=l/A,upperdir=x/diff");
        let mount = |path: &str, minor| Mount {
            device: DevNum { major: 0, minor },
            root: "/".into(),
            mount_point: path.into(),
            fs_type: "overlay".into(),
            options: vec![],
            read_only: false,
        };
        let host = [mount("/d/overlay2/y/merged", 49), mount("/d/overlay2/x/merged", 50)];
        let found = line.candidates(Path::new("x/diff"), &host);
        assert_eq!(found, [Path::new("/d/overlay2/x/diff")]);
        assert!(line.candidates(Path::new("x/diff"), &[]).is_empty());
    }
}
