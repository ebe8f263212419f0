//! The command lines of services, as words: that of the process that runs is in `/proc`, that of the
//! next start is in the unit, with what systemd puts in for variables (systemd.service(5), "Command
//! lines"; systemd.exec(5), "Environment"). What the words mean is the service's own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

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
    Ok(expand(&command.argv, &variables_for(service, &command)?))
}

/// The variables of a service's next start.
pub async fn variables_of_unit(
    systemd: &Systemd,
    service: &str,
) -> Result<BTreeMap<String, String>> {
    variables_for(service, &systemd.start_command(service).await?)
}

fn variables_for(service: &str, command: &StartCommand) -> Result<BTreeMap<String, String>> {
    let mut variables: BTreeMap<String, String> = BTreeMap::new();
    for assignment in &command.environment {
        if let Some((name, value)) = assignment.split_once('=') {
            variables.insert(name.to_owned(), value.to_owned());
        }
    }
    // Read after `Environment=`, and so outdoing it.
    for (path, _) in &command.environment_files {
        ensure!(
            !path.contains(['*', '?', '[']),
            "{service} reads its variables from {path}: which files these are is not looked at"
        );
        let text = files::read_optional(Path::new(path))?.unwrap_or_default();
        variables.extend(self::variables(&text));
    }
    Ok(variables)
}

/// The words of a unit's command line, with its variables.
fn expand(argv: &[String], variables: &BTreeMap<String, String>) -> Vec<String> {
    let mut words = Vec::new();
    for word in argv {
        match word.strip_prefix('$').filter(|name| is_name(name)) {
            // A variable of its own is split at white space; one that is not set is no word.
            Some(name) => words.extend(split(variables.get(name).map_or("", String::as_str))),
            None => words.push(within(word, variables)),
        }
    }
    words
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// A word with `${NAME}` in it.
fn within(word: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, behind)) = after.split_once('}') else { break };
        out += before;
        out += variables.get(name).map_or("", String::as_str);
        rest = behind;
    }
    out + rest
}

/// A text at its white space, outside of quotes.
fn split(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in text.chars() {
        match quote {
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

/// The variables of an `EnvironmentFile=`.
fn variables(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    // A backslash at the end goes on with the next line.
    for line in text.replace("\\\n", " ").lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else { continue };
        let value = value.trim();
        let inner = ['"', '\'']
            .iter()
            .find_map(|q| value.strip_prefix(*q).and_then(|value| value.strip_suffix(*q)));
        found.push((name.trim().to_owned(), inner.unwrap_or(value).to_owned()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_units_variables_are_put_in_as_systemd_does() {
        let text = "# comment\nDOCKER_OPTS=\"-H tcp://:2375 --label 'a b'\"\nEMPTY=\nDIR='/x y'\n\
                    LONG=--icc=false \\\n --debug\nnonsense\n";
        let variables: BTreeMap<_, _> = variables(text).into_iter().collect();
        let argv =
            ["dockerd", "$DOCKER_OPTS", "$EMPTY", "$UNSET", "--data-root=${DIR}/d", "$LONG", "${"];
        let seen = expand(&argv.map(str::to_owned), &variables);
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
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn the_command_line_of_a_process_is_read() {
        assert!(!words_of_process(std::process::id()).unwrap()[0].is_empty());
        assert!(words_of_process(u32::MAX).is_err());
    }
}
