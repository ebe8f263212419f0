//! What this machine must have before an instance can be simulated on it: QEMU, mmdebstrap and
//! their like, installed by apt where they are missing.

use crate::command::{output, run, run_shown};
use crate::progress::{Step, say};
use anyhow::{Context as _, Result, bail, ensure};
use std::path::Path;
use std::process::Command;

/// What is needed, and the package that brings it: a program, a file (a path), or Python's `venv`.
const NEEDED: [(&str, &str); 11] = [
    ("qemu-system-x86_64", QEMU_PACKAGE),
    ("qemu-img", "qemu-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("socat", "socat"),
    ("ssh", "openssh-client"),
    ("setpriv", "util-linux"),
    ("dpkg-shlibdeps", "dpkg-dev"),
    (PYTHON_VENV, "python3-venv"),
    ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ("/etc/ssl/certs/ca-certificates.crt", "ca-certificates"),
];

const PYTHON_VENV: &str = "python3 -m venv";

const QEMU_PACKAGE: &str = "qemu-system-x86";

/// Older ones corrupt the memory of a guest with a current kernel now and then.
const QEMU_AT_LEAST: u32 = 8;

/// Where the entry for backports is written on a Debian 12.
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/hostagent-lab-backports.sources";

/// Makes sure that everything is there; says what it installs before it does.
pub fn prepare() -> Result<()> {
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "the lab builds disk images and installs packages, for which it must be root: \
         run the same command as root"
    );
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "the lab simulates x86_64 instances on an x86_64 machine; this one is {}",
        std::env::consts::ARCH
    );
    let mut missing: Vec<&str> =
        NEEDED.iter().filter(|(thing, _)| !present(thing)).map(|(_, package)| *package).collect();
    missing.dedup();
    if missing.is_empty() {
        check_qemu()?;
        return Ok(());
    }
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "the lab needs {} and can install them only with apt-get (Debian, Ubuntu), \
         which this machine does not have",
        missing.join(", ")
    );
    install(&missing)?;
    check_qemu()
}

/// Whether a thing of [`NEEDED`] is there.
fn present(thing: &str) -> bool {
    if thing == PYTHON_VENV {
        return output(Command::new("/usr/bin/python3").args(["-c", "import ensurepip, venv"]))
            .is_ok_and(|output| output.status.success());
    }
    if thing.starts_with('/') {
        return Path::new(thing).exists();
    }
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(thing).exists())
}

/// Installs packages, on a Debian 12 with QEMU from backports.
fn install(packages: &[&str]) -> Result<()> {
    let step = Step::begin(format!("installing with apt: {}", packages.join(" ")));
    let mut backports = false;
    if packages.iter().any(|package| package.starts_with("qemu-")) && codename()? == "bookworm" {
        backports = add_backports()?;
    }
    apt(&["update", "-q"])?;
    let (qemu, others): (Vec<&str>, Vec<&str>) =
        packages.iter().partition(|package| package.starts_with("qemu-"));
    if !others.is_empty() {
        apt(&[&["install", "-q", "-y", "--no-install-recommends"], &others[..]].concat())?;
    }
    if !qemu.is_empty() {
        let release: &[&str] = if backports { &["-t", "bookworm-backports"] } else { &[] };
        apt(&[&["install", "-q", "-y", "--no-install-recommends"], release, &qemu[..]].concat())?;
    }
    step.done();
    Ok(())
}

fn apt(args: &[&str]) -> Result<()> {
    run_shown(
        Command::new("apt-get")
            .args(["-o", "DPkg::Lock::Timeout=300"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// The name of this machine's release, such as `bookworm`.
fn codename() -> Result<String> {
    let text = std::fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    Ok(text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .unwrap_or_default()
        .trim_matches('"')
        .to_owned())
}

/// Where this machine's apt gets a Debian release from, if it does.
pub fn debian_mirror(release: Option<&str>) -> Result<Option<String>> {
    let format = "$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)";
    let targets = run(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    Ok(targets.lines().find_map(|line| {
        let mut fields = line.split('|');
        let (origin, codename, component, uri) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        (origin == "Debian" && component == "main" && release.is_none_or(|name| name == codename))
            .then(|| uri.trim_end_matches('/').to_owned())
            .filter(|uri| uri.starts_with("http") && !uri.contains("security"))
    }))
}

/// Adds bookworm-backports to apt, from where the machine gets bookworm itself. Returns false when
/// it is there already under another name or when bookworm's own place is not known.
fn add_backports() -> Result<bool> {
    let known = run(Command::new("apt-get").args(["indextargets", "--format", "$(CODENAME)"]))?;
    if known.lines().any(|name| name == "bookworm-backports") {
        return Ok(true);
    }
    if debian_mirror(Some("bookworm"))?.is_none() {
        apt(&["update", "-q"])?;
    }
    let mirror = debian_mirror(Some("bookworm"))?.context(
        "Debian 12's own QEMU 7.2 corrupts guests, and apt does not say where this machine gets \
         bookworm from: add bookworm-backports to apt's sources and try again",
    )?;
    say(format!(
        "Debian 12's own QEMU corrupts guests now and then: adding bookworm-backports to apt \
         ({BACKPORTS_FILE})"
    ));
    let entry = format!(
        "Types: deb\nURIs: {mirror}\nSuites: bookworm-backports\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    );
    std::fs::write(BACKPORTS_FILE, entry).with_context(|| format!("writing {BACKPORTS_FILE}"))?;
    Ok(true)
}

/// The first line that QEMU says about itself.
pub fn qemu_version() -> Result<String> {
    let text = run(Command::new("qemu-system-x86_64").arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Refuses a QEMU that is too old; on a Debian 12 replaces it.
fn check_qemu() -> Result<()> {
    if major(&qemu_version()?)? < QEMU_AT_LEAST && codename()? == "bookworm" {
        install(&[QEMU_PACKAGE, "qemu-utils"])?;
    }
    let version = qemu_version()?;
    if major(&version)? < QEMU_AT_LEAST {
        bail!(
            "this machine has `{version}`, and the lab needs QEMU {QEMU_AT_LEAST} or newer: \
             older ones corrupt guests. Debian 12 (with backports), Debian 13 and Ubuntu 24.04 \
             have a newer one"
        );
    }
    Ok(())
}

/// The major version in `QEMU emulator version 10.0.2 (…)`.
fn major(version: &str) -> Result<u32> {
    version
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1)
        .and_then(|number| number.split('.').next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("no version number in `{version}`"))
}

/// Whether the processor really virtualises. A `/dev/kvm` alone proves nothing: it may open, and
/// the guests then hang.
pub fn has_kvm() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
        && std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// The processor's name: a snapshot taken with its own features is good on its like only.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines().find(|line| line.starts_with("model name")).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(major("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)").unwrap(), 10);
        assert_eq!(major("QEMU emulator version 7.2.17").unwrap(), 7);
        assert!(major("nothing of the kind").is_err());
    }
}
