//! The user-data that users paste, with the address and the hash of the package under test in the
//! place of theirs: the text that README shows is the text that is tested.

use crate::cloud::{Cloud, FILES_URL};
use crate::disk;
use anyhow::{Context as _, Result};
use std::path::Path;

/// The text as users find it.
const TEXT: &str = include_str!("../assets/user-data.sh");

/// Serves a package to the guest, and returns the user-data that installs it.
pub fn installing(package: &Path, cloud: &Cloud) -> Result<String> {
    let content =
        std::fs::read(package).with_context(|| format!("reading {}", package.display()))?;
    cloud.put_file("hostagent.deb", &content)?;
    Ok(with(&format!("{FILES_URL}/hostagent.deb"), &disk::sha256(package)?))
}

/// The text with its two values set.
fn with(url: &str, sha256: &str) -> String {
    let line = |line: &str| {
        if line.starts_with("url=") {
            format!("url='{url}'\n")
        } else if line.starts_with("sha256=") {
            format!("sha256='{sha256}'\n")
        } else {
            format!("{line}\n")
        }
    };
    TEXT.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn both_values_are_set() {
        let text = super::with("http://there", "abc");
        assert!(text.starts_with("#!/bin/sh\n"));
        assert!(text.contains("\nurl='http://there'\nsha256='abc'\n"));
        assert!(!text.contains("example.com"));
    }

    #[test]
    fn readme_shows_what_is_tested() {
        let readme = include_str!("../../../README.md");
        assert!(readme.contains(&format!("```sh\n{}```\n", super::TEXT)));
    }
}
