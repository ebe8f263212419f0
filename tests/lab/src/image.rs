//! The guest image: a Debian much like its EC2 image, with Docker and cloud-init, made by
//! mmdebstrap. The kernel and its initial file system lie next to the disk, for QEMU starts them
//! directly: there is no boot loader, and no partition table.

use crate::cache::{self, Key};
use crate::command::run;
use crate::progress::Step;
use anyhow::{Context as _, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Debian release of an instance unless another is asked for.
pub const DEFAULT_RELEASE: &str = "trixie";

/// The oldest Debian release that hostagent runs on. What is of a release other than the default one
/// has its name as suffix: scenarios, snapshots.
pub const OLDEST_RELEASE: &str = "bookworm";

/// The version of the C library that it has.
pub const OLDEST_LIBC: (u32, u32) = (2, 36);

/// The disk's size; it is sparse.
const SIZE: &str = "8G";

/// Changes whenever this file builds something else from the same assets.
const RECIPE: &str = "1";

/// A guest image in the cache.
#[derive(Debug, Clone)]
pub struct Image {
    dir: PathBuf,
    release: String,
}

impl Image {
    /// Finds the image of a Debian release in the cache, or builds it.
    pub fn of(release: &str) -> Result<Self> {
        let assets = assets();
        let key = Key::new().with(RECIPE).with(release).with(SIZE).with_tree(&assets)?;
        let dir = cache::entry(&format!("images/{release}"), &key, |dir| build(release, dir))?;
        Ok(Self { dir, release: release.to_owned() })
    }

    /// The Debian release.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The raw disk. Never written to: instances run on overlays.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("root.raw")
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The initial file system.
    pub fn initrd(&self) -> PathBuf {
        self.dir.join("initrd.img")
    }

    /// Differs for every build, the same recipe built twice included: a snapshot fits one only.
    pub fn id(&self) -> Result<String> {
        let path = self.dir.join("id");
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }
}

fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/image")
}

/// Builds the image of a release into a directory.
fn build(release: &str, dir: &Path) -> Result<()> {
    let step = Step::begin(format!("building the guest image, Debian {release} (a minute or two)"));
    let assets = assets();
    let root = dir.join("rootfs");
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--variant=apt", "--aptopt=APT::Install-Recommends \"false\""])
        .arg(format!("--include={}", packages(&assets, release)?.join(",")))
        .arg(format!("--essential-hook=cp -rT '{}/files' \"$1\"", assets.display()))
        .arg(format!("--customize-hook='{}/customize.sh' \"$1\"", assets.display()))
        .arg(release)
        .arg(&root);
    // Without a mirror mmdebstrap takes Debian's default.
    command.args(crate::host::debian_mirror(None)?);
    run(&mut command).context("building the guest image")?;

    take(&root, "vmlinuz", dir)?;
    take(&root, "initrd.img", dir)?;
    let disk = dir.join("root.raw");
    run(Command::new("truncate").args(["--size", SIZE]).arg(&disk))?;
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-L", "root", "-d"]).args([&root, &disk]))
        .context("writing the guest image's file system")?;
    fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))?;
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid").context("making a random id")?;
    fs::write(dir.join("id"), id.trim())?;
    step.done();
    Ok(())
}

/// Copies a file of the new root that its `/` has a symbolic link to.
fn take(root: &Path, name: &str, dir: &Path) -> Result<()> {
    let link = root.join(name);
    let target = fs::read_link(&link)
        .with_context(|| format!("the guest image has no /{name}: no kernel?"))?;
    let file = root.join(target.strip_prefix("/").unwrap_or(&target));
    fs::copy(&file, dir.join(name)).with_context(|| format!("copying {}", file.display()))?;
    Ok(())
}

/// The packages of a release: those of all releases, and its own.
fn packages(assets: &Path, release: &str) -> Result<Vec<String>> {
    let common = assets.join("packages");
    let mut text =
        fs::read_to_string(&common).with_context(|| format!("reading {}", common.display()))?;
    text += &fs::read_to_string(assets.join(format!("packages.{release}"))).unwrap_or_default();
    let names =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(names.map(str::to_owned).collect())
}
