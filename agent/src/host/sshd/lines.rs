//! The lines of sshd's configuration, in whichever file they are, and the change of those that say
//! where it listens.
//!
//! `Port` and `ListenAddress` add up over all files, unlike every other keyword, of which the first
//! value counts (sshd_config(5)). So a file of ours cannot take back what another one says of them. Nor
//! can it outdo what stands behind `Match`, which replaces what is said without it.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Where sshd begins to read.
pub const MAIN: &str = "/etc/ssh/sshd_config";

/// sshd follows includes this deep (`SERVCONF_MAX_DEPTH` in its servconf.c).
const MAX_DEPTH: usize = 16;

/// A line of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The file it is in.
    pub file: PathBuf,
    /// Its number, from 1.
    pub number: usize,
    /// The whole line as it stands there.
    pub text: String,
    /// What it sets, in lower case.
    pub keyword: String,
    /// To what: the words behind the keyword.
    pub value: Vec<String>,
    /// Whether it stands behind `Match`.
    pub conditional: bool,
}

/// The keywords that say where sshd listens, as [`Line::keyword`] has them.
pub const LISTENING: [&str; 2] = ["port", LISTEN_ADDRESS];

/// The one that names addresses.
pub const LISTEN_ADDRESS: &str = "listenaddress";

impl Line {
    /// The port that it names itself; none for a `ListenAddress` that leaves it to `Port`.
    #[must_use]
    pub fn port(&self) -> Option<&str> {
        let value = self.value.first()?;
        if self.keyword == LISTEN_ADDRESS { split_port(value).1 } else { Some(value) }
    }

    /// The change after which it does not name a port: `Port` goes, `ListenAddress` keeps its address.
    #[must_use]
    pub fn without_port(&self) -> Edit {
        let becomes = self.value.split_first().filter(|_| self.keyword == LISTEN_ADDRESS);
        let becomes = becomes.map(|(value, rest)| {
            let words = std::iter::once(split_port(value).0).chain(rest.iter().map(|w| &**w));
            format!("ListenAddress {}", words.collect::<Vec<_>>().join(" "))
        });
        Edit { file: self.file.clone(), number: self.number, text: self.text.clone(), becomes }
    }
}

/// Splits `host:port` as sshd does: an IPv6 address is in brackets where a port follows.
fn split_port(value: &str) -> (&str, Option<&str>) {
    if let Some((host, rest)) = value.strip_prefix('[').and_then(|v| v.split_once(']')) {
        return (host, rest.strip_prefix(':'));
    }
    match value.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, Some(port)),
        _ => (value, None),
    }
}

/// The change of one line of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edit {
    /// The file.
    pub file: PathBuf,
    /// The line's number, from 1.
    pub number: usize,
    /// The line as it stands there; if it does not, nothing is changed.
    pub text: String,
    /// What stands there in effect afterwards, if anything. The line itself stays as a comment.
    pub becomes: Option<String>,
}

impl fmt::Display for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (text, file) = (self.text.trim(), self.file.display());
        match &self.becomes {
            Some(new) => write!(f, "`{text}` in {file} becomes `{new}`"),
            None => write!(f, "`{text}` in {file} becomes a comment"),
        }
    }
}

/// What a line that was set aside begins with.
const MARK: &str = "# Set aside by hostagent (control sshd-port): ";

/// A file's content after these changes of it. Every other byte stays.
pub fn edited(content: &[u8], edits: &[&Edit]) -> Result<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = content.split_inclusive(|b| *b == b'\n').map(Vec::from).collect();
    for edit in edits {
        let line = edit.number.checked_sub(1).and_then(|at| lines.get_mut(at));
        let line = line.filter(|line| text_of(line) == edit.text);
        let Some(line) = line else {
            bail!(
                "line {} of {} is not {:?} any more; nothing is changed there",
                edit.number,
                edit.file.display(),
                edit.text
            );
        };
        let mut new = MARK.as_bytes().to_vec();
        new.append(line);
        if let Some(becomes) = &edit.becomes {
            if new.last() != Some(&b'\n') {
                new.push(b'\n');
            }
            new.extend_from_slice(becomes.as_bytes());
            new.push(b'\n');
        }
        *line = new;
    }
    Ok(lines.concat())
}

/// A line's text, whatever encoding its comments are in.
fn text_of(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_end_matches(['\n', '\r']).to_owned()
}

/// The lines that set one of these keywords (in lower case), in every file that sshd reads but `ours`;
/// of that only what is behind `Match`, which hostagent does not write.
pub fn elsewhere(ours: &str, keywords: &[&str]) -> Result<Vec<Line>> {
    let mut found = Vec::new();
    let walk = Walk { base: Path::new("/etc/ssh"), ours: Path::new(ours) };
    walk.collect(Path::new(MAIN), 0, false, &mut found)?;
    found.retain(|line| keywords.contains(&line.keyword.as_str()));
    Ok(found)
}

/// The way through sshd's files.
struct Walk<'a> {
    /// What relative paths are relative to.
    base: &'a Path,
    /// The file of which only what is behind `Match` counts.
    ours: &'a Path,
}

impl Walk<'_> {
    /// Adds the lines of `file` and of what it includes.
    fn collect(
        &self,
        file: &Path,
        depth: usize,
        mut conditional: bool,
        found: &mut Vec<Line>,
    ) -> Result<()> {
        ensure!(depth <= MAX_DEPTH, "{}: sshd's files include each other too deep", file.display());
        let content = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        for (at, line) in content.split_inclusive(|b| *b == b'\n').enumerate() {
            let text = text_of(line);
            let Some((keyword, value)) = parse(&text) else { continue };
            let keyword = keyword.to_ascii_lowercase();
            if keyword == "include" {
                for pattern in value {
                    for path in expand(&self.base.join(pattern))? {
                        let before = found.len();
                        self.collect(&path, depth + 1, conditional, found)?;
                        if path == self.ours {
                            let inside = found.split_off(before);
                            found.extend(inside.into_iter().filter(|line| line.conditional));
                        }
                    }
                }
                continue;
            }
            // Until the file's end: what it was included in goes on as before.
            conditional |= keyword == "match";
            let file = file.to_owned();
            // A file that is included twice has its lines once.
            let line = Line { file, number: at + 1, text, keyword, value, conditional };
            if !found.contains(&line) {
                found.push(line);
            }
        }
        Ok(())
    }
}

/// The keyword of a line and the words behind it; none for a comment or an empty line.
fn parse(line: &str) -> Option<(&str, Vec<String>)> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let end = line.find(|c: char| c.is_whitespace() || c == '=').unwrap_or(line.len());
    let (keyword, rest) = line.split_at(end);
    let rest = rest.trim_start();
    let mut rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let mut words = Vec::new();
    while !rest.is_empty() && !rest.starts_with('#') {
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len())),
        };
        words.push(word.to_owned());
        rest = after.trim_start();
    }
    Some((keyword, words))
}

/// The files that match a pattern of `Include`, sorted as glob(3) sorts them. No match is no file.
fn expand(pattern: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = vec![PathBuf::new()];
    for part in pattern {
        let text = part.to_string_lossy();
        if text.contains(['[', '{', '\\']) {
            bail!("`Include {}` is a pattern that hostagent does not follow", pattern.display());
        }
        if !text.contains(['*', '?']) {
            for path in &mut paths {
                path.push(part);
            }
            continue;
        }
        let mut matched = Vec::new();
        for dir in &paths {
            let entries = match std::fs::read_dir(dir) {
                Ok(entries) => entries,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e).with_context(|| format!("listing {}", dir.display())),
            };
            for entry in entries {
                let name = entry.with_context(|| format!("listing {}", dir.display()))?.file_name();
                let name = name.to_string_lossy();
                // As in a shell, a leading dot is matched by a dot only.
                if (text.starts_with('.') || !name.starts_with('.'))
                    && matches(text.as_bytes(), name.as_bytes())
                {
                    matched.push(dir.join(&*name));
                }
            }
        }
        paths = matched;
    }
    paths.retain(|path| path.exists());
    paths.sort();
    Ok(paths)
}

/// Whether a name matches a pattern of `*` and `?`.
pub(super) fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => {
            matches(rest, name)
                || name.split_first().is_some_and(|(_, name)| matches(pattern, name))
        }
        (Some((b'?', rest)), Some((_, name))) => matches(rest, name),
        (Some((wanted, rest)), Some((seen, name))) => wanted == seen && matches(rest, name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn line(text: &str) -> Line {
        let (keyword, value) = parse(text).unwrap();
        let keyword = keyword.to_ascii_lowercase();
        Line { file: "f".into(), number: 1, text: text.into(), keyword, value, conditional: false }
    }

    #[test]
    fn a_port_is_told_from_an_address() {
        let table = [
            ("Port 22", Some("22"), None),
            ("Port ssh", Some("ssh"), None),
            ("ListenAddress 0.0.0.0", None, Some("ListenAddress 0.0.0.0")),
            ("ListenAddress 0.0.0.0:22", Some("22"), Some("ListenAddress 0.0.0.0")),
            ("ListenAddress [::]:22", Some("22"), Some("ListenAddress ::")),
            ("ListenAddress ::", None, Some("ListenAddress ::")),
            ("ListenAddress fd00::1:22", None, Some("ListenAddress fd00::1:22")),
            ("ListenAddress [fd00::1]", None, Some("ListenAddress fd00::1")),
            ("ListenAddress host:22 rdomain b", Some("22"), Some("ListenAddress host rdomain b")),
            ("ListenAddress \"10.0.0.5:22\" # old", Some("22"), Some("ListenAddress 10.0.0.5")),
        ];
        for (text, port, becomes) in table {
            assert_eq!(line(text).port(), port, "{text}");
            assert_eq!(line(text).without_port().becomes.as_deref(), becomes, "{text}");
        }
    }

    #[test]
    fn keywords_have_several_spellings() {
        for text in ["Port 22", "  port=22", "\tPORT = 22 # x", "Port \"22\"", "Port 22\r"] {
            let (keyword, value) = parse(text).unwrap();
            assert!(keyword.eq_ignore_ascii_case("port") && value == ["22"], "{text:?}");
        }
        for text in ["", "  ", "# Port 22", "  #Port 22"] {
            assert!(parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn includes_are_followed_and_ours_is_left_out() {
        let top = tempfile::tempdir().unwrap();
        let base = top.path();
        let write = |name: &str, text: &str| {
            let path = base.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("d/20.conf", "Port 20\n");
        write("d/10.conf", "ListenAddress 10.0.0.5:22\nMatch User x\n");
        write("d/10-ours.conf", "Port 2222\n");
        write("d/.hidden.conf", "Port 1\n");
        write("d/30.conf.old", "Port 2\n");
        write("main", "# x\nInclude d/*.conf none/*.conf\nInclude d/20.conf\n\nPort 22\n");
        let found = |main: &str| {
            let mut found = Vec::new();
            let ours = base.join("d/10-ours.conf");
            let walk = Walk { base, ours: &ours };
            walk.collect(&base.join(main), 0, false, &mut found)?;
            let mark = |l: &Line| if l.conditional { "behind Match" } else { "" };
            anyhow::Ok(
                found
                    .iter()
                    .map(|l| format!("{} {} {}", l.number, l.text, mark(l)).trim_end().to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(
            found("main").unwrap(),
            [
                "1 ListenAddress 10.0.0.5:22",
                "2 Match User x behind Match",
                "1 Port 20",
                "5 Port 22"
            ]
        );
        // What somebody added to ours is not ours.
        write("d/10-ours.conf", "Port 2222\nMatch User z\nPasswordAuthentication yes\n");
        let added = ["2 Match User z behind Match", "3 PasswordAuthentication yes behind Match"];
        assert_eq!(found("main").unwrap()[..2], added);
        write("d/10-ours.conf", "Port 2222\n");
        write("inner", "X no\nMatch all\nX yes\n");
        write("outer", "Match User y\nInclude inner\nX maybe\n");
        assert_eq!(
            found("outer").unwrap(),
            [
                "1 Match User y behind Match",
                "1 X no behind Match",
                "2 Match all behind Match",
                "3 X yes behind Match",
                "3 X maybe behind Match"
            ]
        );
        write("loop", "Include loop\n");
        assert!(found("loop").is_err());
        write("class", "Include d/[12]0.conf\n");
        assert!(found("class").is_err());
        write("dir.conf/x", "");
        write("main", "Include dir.conf\n");
        assert!(found("main").is_err(), "what cannot be read is not passed over");
        assert!(found("absent").is_err());
    }

    #[test]
    fn only_the_line_that_was_seen_is_changed() {
        let content = b"# caf\xe9\nPort 22\n\nListenAddress [::]:22".to_vec();
        let port = Edit { file: "f".into(), number: 2, text: "Port 22".into(), becomes: None };
        let address = Edit {
            file: "f".into(),
            number: 4,
            text: "ListenAddress [::]:22".into(),
            becomes: Some("ListenAddress ::".into()),
        };
        let new = edited(&content, &[&port, &address]).unwrap();
        let expected = b"# caf\xe9\n# Set aside by hostagent (control sshd-port): Port 22\n\n\
            # Set aside by hostagent (control sshd-port): ListenAddress [::]:22\nListenAddress ::\n";
        assert_eq!(String::from_utf8_lossy(&new), String::from_utf8_lossy(expected));
        let moved = Edit { number: 3, ..port.clone() };
        assert!(edited(&content, &[&moved]).is_err());
        assert!(edited(&new, &[&port]).is_err(), "it was changed already");
        assert!(edited(b"", &[&port]).is_err());
    }

    proptest! {
        #[test]
        fn every_other_byte_stays(
            before in proptest::collection::vec("[^\n]{0,20}", 0..5),
            after in proptest::collection::vec("[^\n]{0,20}", 0..5),
        ) {
            let text = "  Port = 22 # x".to_owned();
            let number = before.len() + 1;
            let lines: Vec<String> = before.iter().chain([&text]).chain(&after).cloned().collect();
            let edit = Edit { file: "f".into(), number, text: text.clone(), becomes: None };
            let new = edited(lines.join("\n").as_bytes(), &[&edit]).unwrap();
            let new = String::from_utf8(new).unwrap();
            let put_back = new.replacen(&format!("{MARK}{text}"), &text, 1);
            prop_assert_eq!(put_back, lines.join("\n"));
            prop_assert_eq!(new.split('\n').filter_map(parse).filter(|(k, _)| *k == "Port").count(),
                lines.iter().filter_map(|l| parse(l)).filter(|(k, _)| *k == "Port").count() - 1);
        }

        #[test]
        fn no_line_makes_the_parser_panic(text in ".{0,60}") {
            if let Some((_, value)) = parse(&text) {
                for word in value {
                    split_port(&word);
                }
            }
        }
    }
}
