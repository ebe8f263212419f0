//! The power fails, at any moment of a provision: on a host whose Docker has data on the root disk,
//! with a blank data volume, a foreign disk with content beside it and a foreign disk that is blank.
//! Whatever the moment was, after the next boot the foreign disks are as they were, no byte of
//! Docker's is lost, and the host is ready, at the latest after one more run.
//!
//! Cuts are cheap, for they are not made one by one. A provision is *filmed*: at the moments that
//! were drawn the machine stands still while its disks are copied, and each copy is what a power cut
//! at this moment leaves. What the guest had not written out is lost; what the disk had taken is
//! kept, flushed or not, as on EBS, which has no cache that forgets. Each copy is then booted, but for
//! moments between which nothing was written: what they left is the same, to the last byte of each
//! disk, and is booted once.

use super::host;
use crate::cache::copy_disk;
use crate::cloud::{Ports, Volume};
use crate::command::{run, tail};
use crate::disk;
use crate::guest::{Guest, Script};
use crate::progress::say;
use crate::qemu::{Machine, Nvme};
use crate::stage::{BRIEF, Cuts, Props, Stage};
use crate::vm::{BOOT, Vm};
use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The longest run, in emulation, while another instance boots.
const RUN: Duration = Duration::from_secs(300);

/// How long a brief boot takes at most, in emulation, while another instance boots.
const BRIEF_BOOT: Duration = Duration::from_secs(300);

/// How many cuts are made of one provision at most.
const PER_FILM: usize = 200;

/// How far beyond the end of a provision moments are drawn, in parts of its duration.
const MARGIN: f64 = 1.1;

/// The root disk's overlay in a directory of copies.
const ROOT: &str = "root.qcow2";

/// The foreign disks: with somebody's filesystem, and blank.
const CONTENT: &str = "vol-0fffffffffffffff1";
const BLANK: &str = "vol-0fffffffffffffff2";

/// How the names of the files begin that must not be lost, and must not stay behind.
const RECORD: &str = "record-of-a-patient";

/// Gives Docker on the root disk what people have in it: an image, a volume with all that a
/// filesystem can express, a stopped container with a file of its own, and one that has removed and
/// replaced what its image has, which leaves a whiteout and an opaque directory. The journal, which
/// writes all the time, keeps to memory: two moments differ by what hostagent and Docker wrote.
const FILL: &str = r#"set -e
mkdir -p /run/fill/bin /run/fill/old /run/fill/gone
cp /bin/busybox /run/fill/bin/
echo image >/run/fill/old/file; echo image >/run/fill/gone/file; echo image >/run/fill/removed
tar -C /run/fill -c . | docker import - filled:local >/dev/null
docker volume create records >/dev/null
cd /var/lib/docker/volumes/records/_data
for i in 1 2 3 4 5 6 7 8; do head -c $((i * 9973)) /dev/urandom >$RECORD-$i; done
mkdir -p "a directory/with spaces" empty
head -c 6000000 /dev/urandom >"a directory/$RECORD-large"
printf x >"a directory/with spaces/new
line"
ln $RECORD-1 hard-link; ln -s $RECORD-2 link; ln -s /nowhere dangling; mkfifo pipe
truncate -s 64M sparse; printf end >>sparse
chown 12345:54321 $RECORD-3; chmod 4755 $RECORD-4; chmod 1777 empty
setfattr -n user.note -v kept $RECORD-5; setfacl -m u:1234:r $RECORD-6
touch -d 2001-02-03T04:05:06.789 $RECORD-7; touch -d 2001-02-03 "a directory"
docker create --name keeper filled:local /bin/busybox true >/dev/null
head -c 50000 /dev/urandom >/run/$RECORD-kept
docker cp -q /run/$RECORD-kept keeper:/$RECORD-kept
docker run --network none --name changer filled:local /bin/busybox sh -c \
    '/bin/busybox rm -r /removed /gone; /bin/busybox mkdir /gone; echo mine >/gone/new; echo mine >/old/file'
mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\n' >/etc/systemd/journald.conf.d/power-cut.conf
systemctl restart systemd-journald
sync"#;

/// Every byte of it with its attributes, a line each, as found in the directory `$1` that was or is
/// `/var/lib/docker`. What the daemon itself keeps beside is its own business, and so is the time of a
/// layer's own directory, which `docker cp` changes.
const MANIFEST: &str = r#"cd "$1" 2>/dev/null || exit 0
export LC_ALL=C
set -- $(ls -d volumes/*/_data overlay2/*/diff image/overlay2/imagedb/content 2>/dev/null)
[ $# -gt 0 ] || exit 0
ls -d volumes/* containers/* | grep -v '\.db$' | grep -v backingFs
find "$@" -type f -printf 'f %m %U %G %n %T@ %s %p\n' \
    -o -type d -path 'overlay2/*/diff' ! -path 'overlay2/*/diff/*' -printf 'd %m %U %G %p\n' \
    -o -type d -printf 'd %m %U %G %T@ %p\n' \
    -o -printf '%y %m %U %G %T@ %p -> %l\n'
find "$@" -type f -print0 | xargs -0 -r sha256sum
getfattr -R -P -h -d -m - -e hex "$@" 2>/dev/null | awk '/^# file: /{f=substr($0,9);next} NF{print "x",f,$0}'
find "$@" -type c -printf 'device %p ' -exec stat -c '%t:%T' {} \;
find "$@" -name sparse -size +60M -printf 'sparse %b\n' | awk '{print $1, ($2 < 2048)}'"#;

/// What was left by a power cut, at one moment or at any of several.
struct Cut {
    /// When, since the start of the run, and what draws this moment again.
    moments: Vec<(Duration, u64)>,
    /// The last that hostagent had said.
    step: String,
    /// The disks.
    dir: PathBuf,
    /// Their content.
    hashes: Vec<String>,
}

impl Cut {
    /// The seed of the first moment.
    fn seed(&self) -> u64 {
        self.moments.first().map_or(0, |(_, seed)| *seed)
    }
}

impl std::fmt::Display for Cut {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seeds: Vec<String> = self.moments.iter().map(|(_, seed)| seed.to_string()).collect();
        let times: Vec<String> =
            self.moments.iter().map(|(at, _)| format!("{:.1}", at.as_secs_f64())).collect();
        write!(out, "cut {} at {} s, at `{}`", seeds.join(", "), times.join(", "), self.step)
    }
}

/// What every check compares with.
struct Before {
    /// What Docker had, by [`MANIFEST`].
    docker: BTreeSet<String>,
    /// The hashes of the foreign disks, by volume.
    foreign: [(Volume, String); 2],
}

/// What a host became after a cut.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Ready,
    /// With what it names.
    Refused(Vec<&'static str>),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready => out.write_str("ready"),
            Self::Refused(controls) => write!(out, "not ready: {}", controls.join(", ")),
        }
    }
}

pub(super) fn power_cut(stage: &mut Stage) -> Result<()> {
    let Cuts { times, seed } = stage.props.cuts;
    let before = prepare(stage)?;
    let lab = Lab { props: stage.props, ports: stage.cloud.ports(), dir: stage.dir().to_owned() };

    let duration = lab.uncut(&before)?;
    say(format!("  a provision that nothing cuts: ready, in {:.1} s", duration.as_secs_f64()));
    say(format!("  {times} cuts, seeds {seed} and up (one again: --times 1 --seed SEED)"));
    let (mut booted, mut ready) = (0, 0);
    let mut failed = Vec::new();
    let mut steps = BTreeSet::new();
    let seeds: Vec<u64> = (seed..).take(times).collect();
    for seeds in seeds.chunks(PER_FILM) {
        let film = tempfile::Builder::new().prefix("film-").tempdir_in(&lab.dir)?;
        let cuts = lab.film(film.path(), duration, seeds)?;
        for (cut, result) in lab.check_all(&cuts, &before) {
            booted += 1;
            steps.insert(cut.step.clone());
            match result {
                Ok(()) => ready += cut.moments.len(),
                Err(error) => failed.push(format!("{cut}: {}", first_line(&error))),
            }
        }
    }
    say(format!(
        "  {times} cuts at {} places left {booted} different states, each of which was booted: \
         {ready} cuts ready, {} failed",
        steps.len(),
        times - ready
    ));
    ensure!(failed.is_empty(), "of {times} cuts: {}", failed.join("; "));
    Ok(())
}

fn first_line(error: &anyhow::Error) -> String {
    format!("{error:#}").lines().next().unwrap_or_default().to_owned()
}

/// The moment that a seed draws, as a part of the whole from 0 to 1. Neighbouring seeds lie far
/// apart and any run of them evenly spread (Weyl's sequence with the golden ratio).
#[expect(clippy::cast_precision_loss, reason = "53 bits are left, which is what a f64 holds")]
fn drawn(seed: u64) -> f64 {
    (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Fills Docker, saves the instance as it is then, and makes the foreign disks.
fn prepare(stage: &mut Stage) -> Result<Before> {
    let script = FILL.replace("$RECORD", RECORD);
    let guest = stage.guest()?;
    guest.succeed(&Script::new(&script).deadline(Duration::from_mins(3)))?;
    let docker = manifest(guest, "/var/lib/docker")?;
    for expected in ["x ", "device ", "sparse 1", "p ", "l "] {
        ensure!(docker.iter().any(|line| line.starts_with(expected)), "no {expected}: {docker:#?}");
    }
    stage.save("filled", "installed")?;
    let (content, blank) = (Volume::new(CONTENT, true), Volume::new(BLANK, true));
    stage.announce(&host::volume(), host::DEVICE)?;
    stage.announce(&content, "/dev/sdg")?;
    stage.announce(&blank, "/dev/sdh")?;
    let mut hashes = Vec::new();
    for volume in [&content, &blank] {
        let file = stage.disk_of(volume).file;
        disk::create(&file, volume.size)?;
        if volume.id == CONTENT {
            let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
            run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&tree, &file]))?;
        }
        hashes.push(disk::hash(&file)?);
    }
    let [content_hash, blank_hash] = &hashes[..] else { bail!("two disks, two hashes") };
    Ok(Before { docker, foreign: [(content, content_hash.clone()), (blank, blank_hash.clone())] })
}

/// What a directory holds that was or is `/var/lib/docker`.
fn manifest(guest: &mut Guest, directory: &str) -> Result<BTreeSet<String>> {
    let script = format!("set -- '{directory}'\n{MANIFEST}");
    let listing = guest.succeed(&Script::new(&script).deadline(Duration::from_mins(2)))?;
    Ok(listing.lines().map(str::to_owned).collect())
}

/// What films and checks are made with; shared by the threads that check.
struct Lab<'a> {
    props: &'a Props,
    ports: Ports,
    /// The stage's directory, with the instance that was saved.
    dir: PathBuf,
}

impl Lab<'_> {
    /// Starts the filled instance with all disks plugged, in a directory of its own.
    fn restore(&self, dir: &Path) -> Result<Vm> {
        let base = dir.join("base.qcow2");
        copy_disk(&self.dir.join(ROOT), &base)?;
        let mut vm = Vm::start(&Machine {
            snapshot: Some("filled"),
            ..Machine::new(&self.props.image, &base, dir, self.ports)
        })?;
        vm.divert_root(&dir.join(ROOT))?;
        disk::create(&dir.join(file_of(host::VOLUME)), host::volume().size)?;
        for id in [CONTENT, BLANK] {
            copy_disk(&self.dir.join(file_of(id)), &dir.join(file_of(id)))?;
        }
        for disk in disks(dir, 0) {
            vm.plug_nvme(&disk)?;
        }
        vm.guest.until("test $(ls -d /sys/block/nvme?n1 | wc -l) = 3", Duration::from_secs(20))?;
        Ok(vm)
    }

    /// A provision that nothing cuts, which must make the host ready: how long it takes.
    fn uncut(&self, before: &Before) -> Result<Duration> {
        let dir = tempfile::Builder::new().prefix("uncut-").tempdir_in(&self.dir)?;
        let mut vm = self.restore(dir.path())?;
        let begun = Instant::now();
        host::provision(&mut vm.guest, RUN)?;
        let duration = begun.elapsed();
        let outcome = judge(&mut vm.guest, before)
            .and_then(|outcome| foreign_untouched(dir.path(), before).map(|()| outcome))
            .map_err(|error| with_evidence(&error, &mut vm))
            .context("a provision that nothing cuts")?;
        ensure!(outcome == Outcome::Ready, "a provision that nothing cuts left the host {outcome}");
        Ok(duration)
    }

    /// Provisions once, and copies the disks at the moments that the seeds draw.
    fn film(&self, dir: &Path, duration: Duration, seeds: &[u64]) -> Result<Vec<Cut>> {
        let mut moments: Vec<(Duration, u64)> =
            seeds.iter().map(|&seed| (duration.mul_f64(drawn(seed) * MARGIN), seed)).collect();
        moments.sort();
        let mut vm = self.restore(dir)?;
        vm.guest.sh("systemctl start --no-block hostagent.service")?;
        let mut cuts: Vec<Cut> = Vec::new();
        let mut ran = Duration::ZERO;
        let mut since = Instant::now();
        for (moment, seed) in moments {
            std::thread::sleep(moment.saturating_sub(ran + since.elapsed()));
            ran += since.elapsed();
            let to = dir.join(format!("cut-{seed}"));
            fs::create_dir(&to)?;
            let hashes = vm.frozen(|| {
                let files = [host::VOLUME, CONTENT, BLANK].map(file_of);
                let files = files.iter().map(String::as_str).chain([ROOT]);
                files
                    .map(|file| {
                        copy_disk(&dir.join(file), &to.join(file))?;
                        disk::hash(&to.join(file))
                    })
                    .collect::<Result<Vec<String>>>()
            })?;
            match cuts.last_mut() {
                Some(last) if last.hashes == hashes => {
                    last.moments.push((ran, seed));
                    fs::remove_dir_all(&to)?;
                }
                _ => {
                    let step = last_step(&vm.serial());
                    cuts.push(Cut { moments: vec![(ran, seed)], step, dir: to, hashes });
                }
            }
            since = Instant::now();
        }
        say(format!("  {} moments of a provision, {} states", seeds.len(), cuts.len()));
        Ok(cuts)
    }

    /// Boots and judges cuts, as many side by side as there are processors.
    fn check_all<'c>(&self, cuts: &'c [Cut], before: &Before) -> Vec<(&'c Cut, Result<()>)> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        let jobs = std::thread::available_parallelism().map_or(1, usize::from).min(4);
        std::thread::scope(|scope| {
            for _ in 0..jobs.min(cuts.len()) {
                scope.spawn(|| {
                    while let Some(cut) = cuts.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let begun = Instant::now();
                        let result = self.check(cut, before);
                        let _ = fs::remove_dir_all(&cut.dir);
                        let took = begun.elapsed().as_secs();
                        match &result {
                            Ok(()) => say(format!("  {cut}: ready ({took} s)")),
                            Err(error) => say(format!("  {cut}: FAILED ({took} s): {error:#}")),
                        }
                        let mut results =
                            results.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        results.push((cut, result));
                    }
                });
            }
        });
        results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Switches the power on again, and judges what becomes of the host: by itself, and after one
    /// more run.
    fn check(&self, cut: &Cut, before: &Before) -> Result<()> {
        let disk = cut.dir.join(ROOT);
        let boot = || {
            Vm::start(&Machine {
                disks: disks(&cut.dir, cut.seed()),
                parameters: BRIEF,
                ..Machine::new(&self.props.image, &disk, &cut.dir, self.ports)
            })
        };
        let mut vm = boot()?;
        if vm.guest.wait(BRIEF_BOOT).is_err() && vm.stands_still() {
            say(format!(
                "  {cut}: the emulated processor stands still; the power is cut once more"
            ));
            drop(vm);
            vm = boot()?;
        }
        // A second run on a ready host is the less telling case, and costs as much as the other.
        let again = |first: &Outcome| *first != Outcome::Ready || cut.seed().is_multiple_of(3);
        let result = Self::judge_twice(&mut vm, before, again)
            .and_then(|outcome| foreign_untouched(&cut.dir, before).map(|()| outcome))
            // Nothing about these disks is a reason to refuse them.
            .and_then(|outcome| {
                ensure!(outcome == Outcome::Ready, "the host is {outcome}");
                Ok(())
            });
        result.map_err(|error| with_evidence(&error, &mut vm))
    }

    fn judge_twice(
        vm: &mut Vm,
        before: &Before,
        again: impl FnOnce(&Outcome) -> bool,
    ) -> Result<Outcome> {
        let guest = &mut vm.guest;
        guest.wait(BOOT)?;
        host::settled(guest, RUN).context("the run after the cut does not end")?;
        let first = judge(guest, before).context("after the boot")?;
        if !again(&first) {
            return Ok(first);
        }
        let again = host::hostagent(guest, "provision")?;
        let second = judge(guest, before).context("after one more run")?;
        ensure!((again.status == 0) == (second == Outcome::Ready), "{second}, and {again:?}");
        ensure!(first != Outcome::Ready || second == first, "one more run made it {second}");
        ensure!(
            second == Outcome::Ready || first == second,
            "one more run made of {first} {second}"
        );
        Ok(second)
    }
}

/// Judges a host whose run has ended, by what must be true whatever happened before.
fn judge(guest: &mut Guest, before: &Before) -> Result<Outcome> {
    let status = host::hostagent(guest, "status")?;
    match status.status {
        0 => {
            ensure!(status.stdout.starts_with("ready since"), "{status:?}");
            guest.sh("test -s /run/hostagent/ready")?;
            guest.sh(
                "systemctl is-active hostagent-ready.target docker.service containerd.service",
            )?;
            host::expect_storage(guest)?;
            let missing = missing(before, &manifest(guest, "/var/lib/docker")?);
            ensure!(missing.is_empty(), "ready, and lost of Docker's data:\n{missing}");
            guest
                .sh(&format!(
                    "docker image inspect filled:local >/dev/null && docker volume inspect records >/dev/null && \
                     docker inspect changer >/dev/null && docker cp -q keeper:/{RECORD}-kept - | tar -xO | \
                     cmp - /var/lib/docker/overlay2/*/diff/{RECORD}-kept"
                ))
                .context("Docker does not have what it had")?;
            let left =
                guest.sh(&format!("{BENEATH} find $b -xdev -name '{RECORD}*'; {UNBENEATH}"))?;
            ensure!(left.trim().is_empty(), "ready, and data is left on the root disk:\n{left}");
            Ok(Outcome::Ready)
        }
        1 => {
            let named: Vec<&str> =
                host::CONTROLS.into_iter().filter(|id| status.stdout.contains(id)).collect();
            ensure!(status.stdout.starts_with("not ready"), "{status:?}");
            ensure!(!named.is_empty(), "no reason is named: {status:?}");
            guest.sh("! test -e /run/hostagent/ready").context("the marker is there")?;
            guest
                .sh("! systemctl is-active --quiet hostagent-ready.target")
                .context("the target is up")?;
            guest.sh("! pgrep -x dockerd && ! pgrep -x containerd").context("Docker runs")?;
            whole_somewhere(guest, before)
                .with_context(|| format!("not ready ({})", status.stdout.trim()))?;
            Ok(Outcome::Refused(named))
        }
        _ => bail!("the run left no result: {status:?}"),
    }
}

/// Makes the root disk visible without what is mounted on it, as `$b`.
const BENEATH: &str = "b=/run/beneath; mkdir -p $b && mount --bind / $b &&";
const UNBENEATH: &str = "umount /run/beneath";

/// Expects that all of Docker's data is still on the root disk, or all of it on the volume.
fn whole_somewhere(guest: &mut Guest, before: &Before) -> Result<()> {
    guest.sh(&format!("{BENEATH} true"))?;
    let old = manifest(guest, "/run/beneath/var/lib/docker");
    guest.sh(UNBENEATH)?;
    let old = missing(before, &old?);
    if old.is_empty() {
        return Ok(());
    }
    let serial = host::volume().serial();
    guest.sh(&format!(
        "mkdir -p /run/volume && mount -o ro $(readlink -e /dev/disk/by-id/nvme-*_{serial}) /run/volume"
    ))
    .with_context(|| format!("the root disk has lost of Docker's data:\n{old}and the volume"))?;
    let new = manifest(guest, "/run/volume/docker");
    guest.sh("umount /run/volume")?;
    let new = missing(before, &new?);
    ensure!(
        new.is_empty(),
        "Docker's data is whole nowhere: the root disk has lost\n{old}and the volume\n{new}"
    );
    Ok(())
}

/// What was there and is not any more, the first lines of it.
fn missing(before: &Before, now: &BTreeSet<String>) -> String {
    before.docker.difference(now).take(5).flat_map(|line| [line.as_str(), "\n"]).collect()
}

fn foreign_untouched(dir: &Path, before: &Before) -> Result<()> {
    for (volume, hash) in &before.foreign {
        let now = disk::hash(&dir.join(file_of(&volume.id)))?;
        ensure!(now == *hash, "the foreign disk {} was written to", volume.id);
    }
    Ok(())
}

fn with_evidence(error: &anyhow::Error, vm: &mut Vm) -> anyhow::Error {
    let journal = vm
        .guest
        .sh("hostagent status; journalctl -b --no-pager -o short-monotonic -u hostagent -u data.mount \
             -u 'var-lib-*' -u docker -u containerd | tail -n 80")
        .unwrap_or_else(|error| format!("no journal: {error:#}\n{}", tail(&vm.serial(), 40)));
    anyhow::anyhow!("{error:#}\n{journal}")
}

/// The file of a volume's disk.
fn file_of(id: &str) -> String {
    format!("{id}.raw")
}

/// The disks in a directory, in an order that differs from one cut to the next.
fn disks(dir: &Path, seed: u64) -> Vec<Nvme> {
    let mut ids = [CONTENT, host::VOLUME, BLANK];
    ids.rotate_left(usize::try_from(seed % 3).unwrap_or_default());
    let disk = |id: &str| Nvme::new(&dir.join(file_of(id)), &Volume::new(id, true).serial());
    ids.into_iter().map(disk).collect()
}

/// The last line of hostagent's on the console.
fn last_step(serial: &str) -> String {
    let line = serial.lines().rev().find_map(|line| line.split_once("hostagent: "));
    let line = line.map_or("nothing was said", |(_, said)| said);
    line.chars().take(70).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_spread_evenly() {
        for seed in [0, 7, 123_456_789, u64::MAX - 5] {
            let mut drawn: Vec<f64> = (0..12).map(|i| super::drawn(seed.wrapping_add(i))).collect();
            assert!(drawn.iter().all(|part| (0.0..1.0).contains(part)));
            drawn.sort_by(f64::total_cmp);
            let gaps = drawn.windows(2).map(|pair| pair[1] - pair[0]);
            assert!(gaps.fold(0.0, f64::max) < 0.17, "{drawn:?}");
        }
    }

    #[test]
    fn the_last_step_is_told() {
        let serial = "x\n[  12.3] hostagent: data-volume: remember\nlogin:\n";
        assert_eq!(last_step(serial), "data-volume: remember");
        assert_eq!(last_step(""), "nothing was said");
    }
}
