//! How data is moved and the old copy erased: the steps between the states of [`super`].

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{Mode, RenameFlags, fstat, fsync, mkdirat, renameat_with, syncfs};
use tracing::{info, warn};

use super::{
    Next, Place, Space, attribute, exists, free, look_in, mark_of, name_of, new_mark, open_parent,
    open_volume, set_attribute, set_mark,
};
use crate::host::block::DevNum;
use crate::host::docker::Storage;
use crate::host::tree::{self, COMPARED, Progress, Time, human};

/// What stands in the place of the time of the comparison while an old copy is erased.
pub(super) const ERASING: &str = "erasing";

/// Moves the data to the volume, as far as it is not there yet. Docker must be down, and nothing
/// mounted at or below the directory; `idle` fails if something uses a directory nevertheless, and is
/// asked before the copy and before the switch.
pub fn migrate(
    place: &Place,
    device: DevNum,
    idle: &dyn Fn(&Path) -> Result<()>,
    progress: &Progress,
) -> Result<()> {
    tree::raise_descriptor_limit();
    let (old_above, new_above) = (open_parent(&place.directory)?, open_volume(place, device)?);
    let old_name = place.name()?;
    let found = look_in(place, old_above.as_fd(), &old_name, Some(device))?;
    let migration = Migration { place, device, old_above, new_above, old_name, idle, progress };
    match place.next(&found) {
        Next::Nothing => Ok(()),
        Next::Refuse(why) => bail!(why),
        Next::Finish => {
            let new = name_of(&place.target)?;
            let since = compared(migration.old_above.as_fd(), &migration.old_name)?;
            match migration.compare(&new)? {
                Ok(at) => migration.switch(at),
                Err(difference) => {
                    migration.give_up(since, &difference)?;
                    migration.copy(false)
                }
            }
        }
        Next::Copy => migration.copy(matches!(found.new, Some(Storage::Unused))),
    }
}

struct Migration<'a> {
    place: &'a Place,
    device: DevNum,
    old_above: OwnedFd,
    new_above: OwnedFd,
    old_name: CString,
    idle: &'a dyn Fn(&Path) -> Result<()>,
    progress: &'a Progress,
}

impl Migration<'_> {
    fn open_old(&self) -> Result<OwnedFd> {
        tree::open_dir(self.old_above.as_fd(), &self.old_name)
            .with_context(|| format!("opening {}", self.place.directory.display()))
    }

    /// Makes a compared copy, puts it in its place, and switches.
    fn copy(&self, over_unused: bool) -> Result<()> {
        let (directory, target) = (self.place.directory.display(), self.place.target.display());
        let incoming = name_of(&self.place.incoming())?;
        let above = self.new_above.as_fd();
        (self.idle)(&self.place.directory)?;
        self.progress.begin(&format!("measuring {directory}"), 0)?;
        let usage = tree::measure(self.open_old()?, self.progress)?;
        self.progress.begin("removing an unfinished copy", 0)?;
        tree::remove(above, &incoming, self.progress)?;
        let space = Space { needed: usage, free: free(above)? };
        if let Some(lacks) = space.lacks() {
            bail!("{directory} does not fit on {}: {lacks}", self.place.volumes);
        }
        info!("copying {directory} to {target}: {} in {} files", human(usage.bytes), usage.inodes);
        mkdirat(above, &*incoming, Mode::RWXU)
            .with_context(|| format!("making {}", self.place.incoming().display()))?;
        let copy = tree::open_dir(above, &incoming).context("opening the new directory")?;
        let seen = DevNum::of(fstat(&copy)?.st_dev);
        ensure!(seen == self.device, "{target} would be on {seen}, not on {}", self.device);
        self.progress.begin(&format!("copying {directory}"), usage.bytes)?;
        tree::copy(self.open_old()?, copy, self.progress)?;
        self.progress.begin("flushing", 0)?;
        syncfs(above).context("flushing the copy")?;
        let at = match self.compare(&incoming)? {
            Ok(at) => at,
            Err(difference) => bail!(difference),
        };

        let (mark, old) = (new_mark()?, self.open_old()?);
        set_attribute(&old, COMPARED, &at.to_string())?;
        set_mark(&old, &mark)?;
        set_mark(&tree::open_dir(above, &incoming).context("opening the copy")?, &mark)?;
        syncfs(above).context("flushing the copy")?;
        self.progress.tick()?;
        let name = name_of(&self.place.target)?;
        // Over nothing, or in exchange for what no user had a part in; never over data.
        let flags = if over_unused { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
        renameat_with(above, &*incoming, above, &*name, flags)
            .with_context(|| format!("putting the copy in its place, {target}"))?;
        syncfs(above).context("flushing the copy's name")?;
        self.switch(at)
    }

    /// Compares the old directory with a copy on the volume: when that began, or what is not the same.
    fn compare(&self, copy: &CStr) -> Result<Result<Time, String>> {
        let directory = self.place.directory.display();
        let usage = tree::measure(self.open_old()?, self.progress)?;
        self.progress.begin(&format!("comparing {directory}"), usage.bytes)?;
        let copy = tree::open_dir(self.new_above.as_fd(), copy).context("opening the copy")?;
        let seen = DevNum::of(fstat(&copy)?.st_dev);
        ensure!(seen == self.device, "the copy is on {seen}, not on {}", self.device);
        let at = tree::now(self.open_old()?.as_fd())?;
        match tree::compare(self.open_old()?, copy, self.progress)? {
            Ok(alike) => {
                if let Some(path) = alike.linked_outside {
                    warn!(
                        "{directory}/{path} has another link outside of {directory}, through which \
                         it stays on the root disk"
                    );
                }
                Ok(Ok(at))
            }
            Err(difference) => Ok(Err(format!(
                "{directory} and its copy on {} are not the same, so nothing is switched: \
                 {directory}/{difference}",
                self.place.volumes
            ))),
        }
    }

    /// Makes an unfinished copy of one that is not the same any more. Only if that is what it was when it
    /// was compared, and nobody has it: else somebody may have worked with it, and it is the newer one.
    fn give_up(&self, since: Option<Time>, difference: &str) -> Result<()> {
        let target = &self.place.target;
        let refuse =
            |why: &str| format!("{difference}; {why}: look at both, and move one of them away");
        let Some(since) = since else {
            bail!(refuse("when they were is not known"));
        };
        let (above, name) = (self.new_above.as_fd(), name_of(target)?);
        let copy = tree::open_dir(above, &name).context("opening the copy")?;
        if let Some(path) = tree::changed_since(copy, since, self.progress)? {
            bail!(refuse(&format!("{}/{path} was changed since they were", target.display())));
        }
        (self.idle)(target)?;
        warn!("{difference}; it was changed since it was copied, and is copied anew");
        let incoming = name_of(&self.place.incoming())?;
        // What an exchange left, or an earlier copy.
        tree::remove(above, &incoming, self.progress)?;
        renameat_with(above, &*name, above, &*incoming, RenameFlags::NOREPLACE)
            .with_context(|| format!("giving up {}", target.display()))?;
        syncfs(above).context("flushing the copy's name")
    }

    /// Puts the old copy aside, and an empty directory in its place. The comparison began at `compared`:
    /// if something was changed since, the old copy is put back.
    fn switch(&self, compared: Time) -> Result<()> {
        let directory = self.place.directory.display();
        (self.idle)(&self.place.directory).context("nothing is switched")?;
        self.progress.tick()?;
        let above = self.old_above.as_fd();
        let left = name_of(&self.place.left())?;
        set_attribute(&self.open_old()?, COMPARED, &compared.to_string())?;
        self.progress.tick()?;
        let rename = |from: &CStr, to: &CStr| {
            renameat_with(above, from, above, to, RenameFlags::NOREPLACE).with_context(|| {
                format!("renaming between {directory} and {}", self.place.left().display())
            })?;
            fsync(above).context("flushing the new name")
        };
        rename(&self.old_name, &left)?;
        let changed = tree::open_dir(above, &left)
            .context("opening the old copy")
            .and_then(|top| tree::changed_since(top, compared, self.progress));
        if !matches!(changed, Ok(None)) {
            rename(&left, &self.old_name)?;
            let path = changed.context("nothing is switched")?.unwrap_or_default();
            bail!(
                "{directory}/{path} was changed after it had been compared with its copy on {}, so \
                 nothing is switched: see what writes there",
                self.place.volumes
            );
        }
        info!("{directory} is now on {}", self.place.volumes);
        mkdirat(above, &*self.old_name, Mode::RWXU | Mode::XGRP)
            .with_context(|| format!("making {directory}"))?;
        fsync(above).context("flushing the new directory")?;
        // What an exchange left; an interrupted run leaves it to the next copy.
        tree::remove(self.new_above.as_fd(), &name_of(&self.place.incoming())?, self.progress)
    }
}

/// When the comparison of an original with its copy began; none if that was not written down.
fn compared(above: BorrowedFd<'_>, name: &CStr) -> Result<Option<Time>> {
    Ok(attribute(above, name, COMPARED)?.and_then(|text| text.parse().ok()))
}

/// Overwrites and removes the old copy, of which the volume must have the new one. That this is
/// mounted on the directory, and that the volume is the confirmed one, is seen to by who calls. `idle`
/// fails if something uses a directory.
pub fn erase(
    place: &Place,
    device: DevNum,
    idle: &dyn Fn(&Path) -> Result<()>,
    progress: &Progress,
) -> Result<()> {
    tree::raise_descriptor_limit();
    let (old_above, new_above) = (open_parent(&place.directory)?, open_volume(place, device)?);
    let (above, left) = (old_above.as_fd(), name_of(&place.left())?);
    if !exists(above, &left)? {
        return Ok(());
    }
    let mark = mark_of(above, &left)?;
    let copy = mark_of(new_above.as_fd(), &name_of(&place.target)?)?;
    ensure!(
        mark.is_some() && mark == copy,
        "{} is not the copy of {}, which may be all that there is",
        place.target.display(),
        place.left().display()
    );
    if attribute(above, &left, COMPARED)?.as_deref() != Some(ERASING) {
        idle(&place.left()).context("nothing is erased")?;
        let top = tree::open_dir(above, &left).context("opening the old copy")?;
        let shown = place.left();
        let shown = shown.display();
        let changed = match compared(above, &left)? {
            Some(time) => tree::changed_since(top, time, progress)?
                .map(|path| format!("{shown}/{path} was changed after it had been compared")),
            None => Some(format!("when {shown} was compared is not known")),
        };
        if let Some(changed) = changed {
            bail!(
                "{changed} with its copy in {}, so nothing is erased: put there what it lacks, and \
                 move {shown} away",
                place.target.display()
            );
        }
        let top = tree::open_dir(above, &left).context("opening the old copy")?;
        set_attribute(&top, COMPARED, ERASING)?;
    }
    tree::erase(above, &left, progress)
        .with_context(|| format!("erasing {}", place.left().display()))
}
