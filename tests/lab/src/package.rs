//! The .deb of hostagent, by cargo-deb. The lab tests the package that a user would install, built
//! in the dev profile: the AWS SDK takes minutes to compile, and `cargo test` shares that build.

use crate::cache::{self, Key, workspace};
use crate::command::{cargo, run, run_shown};
use crate::image::OLDEST_LIBC;
use crate::progress::Step;
use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version of cargo-deb, pinned: another one may lay the package out differently.
const CARGO_DEB: &str = "3.8.0";

/// How the binary is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Small and fast; takes long to build.
    Release,
    /// What the tests use.
    Dev,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "dev",
        }
    }
}

/// The package somebody named, or else one built for the tests.
pub fn given_or_built(given: Option<PathBuf>) -> Result<PathBuf> {
    match given {
        Some(path) => {
            path.canonicalize().with_context(|| format!("finding the package {}", path.display()))
        }
        None => build(Profile::Dev),
    }
}

/// Builds the binary and the package, and returns the package's path.
pub fn build(profile: Profile) -> Result<PathBuf> {
    let step = Step::begin(format!("building hostagent, profile {}", profile.name()));
    run_shown(
        cargo()
            .args(["build", "--locked", "--package", "hostagent", "--profile"])
            .arg(profile.name()),
    )?;
    step.done();

    let tool = cargo_deb()?;
    let step = Step::begin("building the package");
    let output = target_directory()?.join("debian").join(profile.name());
    std::fs::create_dir_all(&output).with_context(|| format!("creating {}", output.display()))?;
    let mut command = Command::new(tool);
    let cargo = cargo();
    for (name, value) in cargo.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.current_dir(workspace());
    command.args(["--package", "hostagent", "--no-build", "--profile", profile.name()]);
    if profile == Profile::Dev {
        command.arg("--fast");
    }
    let said = run(command.arg("--output").arg(&output))?;
    let Some(path) = said.lines().map(str::trim).next_back() else {
        bail!("cargo-deb does not say where the package is; it said\n{said}");
    };
    step.done();
    Ok(workspace().join(path))
}

/// Whether a package can be installed on the oldest release: one that was built on a newer one may
/// want a newer C library.
pub fn fits_oldest(package: &Path) -> Result<bool> {
    let depends = run(Command::new("dpkg-deb").arg("-f").arg(package).arg("Depends"))?;
    Ok(libc_of(&depends).is_none_or(|needed| needed <= OLDEST_LIBC))
}

/// The version in `libc6 (>= 2.34), …`.
fn libc_of(depends: &str) -> Option<(u32, u32)> {
    let version = depends.split_once("libc6 (>= ")?.1.split_once(')')?.0;
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
}

/// The directory that cargo builds into.
fn target_directory() -> Result<PathBuf> {
    let metadata =
        run(cargo().args(["metadata", "--format-version", "1", "--no-deps", "--locked"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo names no target directory")
}

/// The cargo-deb in the cache, installed if need be.
pub fn cargo_deb() -> Result<PathBuf> {
    let key = Key::new().with("cargo-deb").with(CARGO_DEB);
    let dir = cache::entry("tools", &key, |dir| {
        let step = Step::begin(format!("installing cargo-deb {CARGO_DEB} (two minutes)"));
        run_shown(
            cargo()
                .args(["install", "--quiet", "--locked", "cargo-deb"])
                .arg(format!("--version={CARGO_DEB}"))
                .arg("--root")
                .arg(dir)
                .env("CARGO_TARGET_DIR", dir.join("target"))
                .env("CARGO_PROFILE_RELEASE_LTO", "off")
                .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
        )?;
        std::fs::remove_dir_all(dir.join("target")).context("removing cargo-deb's build")?;
        step.done();
        Ok(())
    })?;
    Ok(dir.join("bin/cargo-deb"))
}

#[cfg(test)]
mod tests {
    use super::libc_of;

    #[test]
    fn the_c_library_that_a_package_wants() {
        assert_eq!(libc_of("libc6 (>= 2.34), libgcc-s1 (>= 4.2)"), Some((2, 34)));
        assert_eq!(libc_of("systemd, libc6 (>= 2.3.6)"), Some((2, 3)));
        assert_eq!(libc_of("systemd"), None);
    }
}
