//! The command lines of services, as words: that of the process that runs is in `/proc`, that of the
//! next start is in the unit, with what systemd puts in for variables (systemd.service(5), "Command
//! lines"; systemd.exec(5), "Environment"). What the words mean is the service's own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use super::files;
use super::systemd::{StartCommand, Systemd};

/// The words of the command line of a process.
pub fn words_of_process(pid: u32) -> Result<Vec<String>> {
    let path = format!("/proc/{pid}/cmdline");
    let bytes = fs::read(&path).with_context(|| format!("reading {path}"))?;
    let text = String::from_utf8_lossy(&bytes);
    // A process that is gone, or is about to be, has none.
    ensure!(!text.is_empty(), "{path} is empty");
    Ok(text.trim_end_matches('\0').split('\0').map(str::to_owned).collect())
}

/// The words of the command line of a service's next start; none for a service that does not exist.
pub async fn words_of_unit(systemd: &Systemd, service: &str) -> Result<Vec<String>> {
    let command = systemd.start_command(service).await?;
    Ok(expand(&command.argv, &variables(&command)?))
}

/// The variables of a service's next start.
pub async fn variables_of_unit(
    systemd: &Systemd,
    service: &str,
) -> Result<BTreeMap<String, String>> {
    variables(&systemd.start_command(service).await?)
}

/// The environment of a service's next start, as far as its unit tells.
fn variables(command: &StartCommand) -> Result<BTreeMap<String, String>> {
    let mut variables = BTreeMap::new();
    for assignment in &command.environment {
        if let Some((name, value)) = assignment.split_once('=') {
            variables.insert(name.to_owned(), value.to_owned());
        }
    }
    // Read after `Environment=`, and so outdoing it.
    for (path, _) in &command.environment_files {
        ensure!(
            !path.contains(['*', '?', '[']),
            "which files EnvironmentFile={path} stands for is not looked at"
        );
        let text = files::read_optional(Path::new(path))?.unwrap_or_default();
        variables.extend(environment_file(&text).with_context(|| format!("reading {path}"))?);
    }
    // Names, or assignments that are taken back only where the value is the same.
    variables.retain(|name, value| {
        !command.unset_environment.iter().any(|unset| match unset.split_once('=') {
            Some((unset, old)) => unset == name && old == value,
            None => unset == name,
        })
    });
    Ok(variables)
}

/// The words of a unit's command line, with its variables (systemd, `replace_env_argv`).
fn expand(argv: &[String], variables: &BTreeMap<String, String>) -> Vec<String> {
    let mut words = Vec::new();
    for word in argv {
        match word
            .strip_prefix('$')
            .filter(|name| !name.is_empty() && !name.starts_with(['{', '$']))
        {
            // A variable of its own is split at white space; one that is not set is no word.
            Some(name) => words.extend(split(variables.get(name).map_or("", String::as_str))),
            None => words.push(within(word, variables)),
        }
    }
    words
}

/// A word with `${NAME}` and `$$` in it.
fn within(word: &str, variables: &BTreeMap<String, String>) -> String {
    let (mut out, mut rest) = (String::new(), word);
    while let Some(at) = rest.find('$') {
        let (before, from) = rest.split_at(at);
        out += before;
        rest = if let Some(behind) = from.strip_prefix("$$") {
            out.push('$');
            behind
        } else if let Some((name, behind)) = from.strip_prefix("${").and_then(|s| s.split_once('}'))
        {
            out += variables.get(name).map_or("", String::as_str);
            behind
        } else {
            out.push('$');
            &from[1..]
        };
    }
    out + rest
}

/// A text at its white space, outside of quotes; a backslash, anywhere, is for the character behind it
/// (systemd, `extract_first_word` with `EXTRACT_UNQUOTE`).
fn split(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match quote {
            _ if c == '\\' => word.get_or_insert_default().extend(rest.next()),
            Some(q) if c == q => quote = None,
            None if c == '"' || c == '\'' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Where the reader of an `EnvironmentFile=` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Line,
    Comment,
    Name,
    /// Before a value, and behind a part of it in quotes.
    Gap,
    Value,
    Quoted(char),
}

/// The variables of an `EnvironmentFile=`, read as systemd does (env-file.c). What its releases read
/// in two ways is an error.
fn environment_file(text: &str) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let (mut at, mut name, mut value) = (At::Line, String::new(), String::new());
    // What of the value is not to be trimmed.
    let mut solid = 0;
    let mut rest = text.chars().chain(['\n']);
    while let Some(c) = rest.next() {
        let ends = c == '\n' || c == '\r';
        match at {
            At::Line if c == '#' || c == ';' => at = At::Comment,
            At::Line if c.is_whitespace() => {}
            At::Line => {
                name = c.to_string();
                at = At::Name;
            }
            // Up to systemd 253 the next line belongs to the comment, from 254 on it does not.
            At::Comment if c == '\\' && rest.next().is_none_or(|c| c == '\n' || c == '\r') => {
                bail!("a comment ends with a backslash; take it away");
            }
            At::Comment if ends => at = At::Line,
            At::Comment => {}
            At::Name if ends => at = At::Line,
            At::Name if c == '=' => {
                solid = 0;
                at = At::Gap;
            }
            At::Name => name.push(c),
            At::Gap | At::Value if ends => {
                value.truncate(value[solid..].trim_end().len() + solid);
                found.push((name.trim_end().to_owned(), std::mem::take(&mut value)));
                at = At::Line;
            }
            At::Gap if c == '"' || c == '\'' => at = At::Quoted(c),
            At::Gap if c.is_whitespace() => {}
            At::Gap | At::Value if c == '\\' => {
                value.extend(rest.next().filter(|c| *c != '\n' && *c != '\r'));
                solid = value.len();
                at = At::Value;
            }
            At::Gap | At::Value => {
                value.push(c);
                at = At::Value;
            }
            At::Quoted(quote) if c == quote => {
                solid = value.len();
                at = At::Gap;
            }
            At::Quoted('"') if c == '\\' => match rest.next() {
                Some(c) if matches!(c, '"' | '\\' | '`' | '$') => value.push(c),
                Some('\n') | None => {}
                Some(c) => value.extend(['\\', c]),
            },
            At::Quoted(_) => value.push(c),
        }
    }
    // A quote that nobody closes lasts to the end.
    if let At::Quoted(_) = at {
        value.pop();
        found.push((name.trim_end().to_owned(), value));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> BTreeMap<String, String> {
        environment_file(text).unwrap().into_iter().collect()
    }

    #[test]
    fn the_units_variables_are_put_in_as_systemd_does() {
        let text = "# comment\nDOCKER_OPTS=\"-H tcp://:2375 --label 'a b'\"\nEMPTY=\nDIR='/x y'\n\
                    LONG=--icc=false \\\n --debug\nnonsense\n";
        let argv = [
            "dockerd",
            "$DOCKER_OPTS",
            "$EMPTY",
            "$UNSET",
            "--data-root=${DIR}/d",
            "$LONG",
            "${",
            "$",
            "$$DIR",
            "a$b",
        ];
        let seen = expand(&argv.map(str::to_owned), &read(text));
        let expected = [
            "dockerd",
            "-H",
            "tcp://:2375",
            "--label",
            "a b",
            "--data-root=/x y/d",
            "--icc=false",
            "--debug",
            "${",
            "$",
            "$DIR",
            "a$b",
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn files_of_variables_are_read_as_systemd_reads_them() {
        for (text, expected) in [
            ("A=b", "b"),
            ("  A = b c \t\r\n", "b c"),
            ("; x\nA=1\nA=2\n", "2"),
            ("A=\"-o \\\"AllowUsers a b\\\"\"\n", "-o \"AllowUsers a b\""),
            ("A=\"a\\b\"\n", "a\\b"),
            ("A='a\\b'\n", "a\\b"),
            ("A=a\\b\\ \n", "ab "),
            ("A=a\\\nb\n", "ab"),
            ("A=\"a\\\nb\"\n", "ab"),
            ("A='x '\"y \" \n", "x y "),
            ("A='x' y \n", "xy"),
            ("A='x\n", "x\n"),
            ("A=\n", ""),
            ("A=a=b\n", "a=b"),
            ("# \\x\nA=b\n", "b"),
        ] {
            assert_eq!(read(text)["A"], expected, "{text:?}");
        }
        assert!(environment_file("# a \\\nA=b\n").is_err(), "two ways to read it");
    }

    #[test]
    fn a_variable_is_split_as_systemd_splits_it() {
        for (text, expected) in [
            ("-o \"AllowUsers a b\" x", vec!["-o", "AllowUsers a b", "x"]),
            ("a\\ b 'c\\'d' \"\"", vec!["a b", "c'd", ""]),
            ("a\\", vec!["a"]),
            (" \t", vec![]),
        ] {
            assert_eq!(split(text), expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_unset_is_not_there() {
        let command = |unset: &[&str]| StartCommand {
            argv: vec![],
            environment: ["A=1", "B=2", "B=3"].map(str::to_owned).to_vec(),
            environment_files: vec![],
            unset_environment: unset.iter().map(|&text| text.to_owned()).collect(),
        };
        let names = |unset: &[&str]| {
            variables(&command(unset)).unwrap().into_values().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(&[]), "1 3");
        assert_eq!(names(&["A", "B=2"]), "3");
        assert_eq!(names(&["B=3"]), "1");
        let mut globbed = command(&[]);
        globbed.environment_files = vec![("/etc/x*".into(), true)];
        assert!(variables(&globbed).is_err());
    }

    #[test]
    fn the_command_line_of_a_process_is_read() {
        assert!(!words_of_process(std::process::id()).unwrap()[0].is_empty());
        assert!(words_of_process(u32::MAX).is_err());
    }
}
