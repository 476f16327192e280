//! Kernel modules: which files a set of names needs, and in which order they load.

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of one kernel package.
#[derive(Debug)]
pub struct Modules {
    /// Version as in `lib/modules/VERSION`.
    pub version: String,
    root: PathBuf,
    /// From name (with `_` for `-`) to path relative to the tree's root.
    files: BTreeMap<String, PathBuf>,
}

/// Modules are named with `-` and `_` interchangeably.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

impl Modules {
    /// Finds the modules in an unpacked kernel package.
    pub fn find(tree: &Path) -> Result<Modules> {
        let base = tree.join("usr/lib/modules");
        let mut versions: Vec<String> = fs::read_dir(&base)
            .with_context(|| format!("read {}", base.display()))?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        versions.sort();
        let version = versions.pop().context("the kernel package has no modules")?;
        let mut files = BTreeMap::new();
        let mut pending = vec![PathBuf::from("usr/lib/modules").join(&version)];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(tree.join(&directory)).context("read the modules")?.flatten() {
                let path = directory.join(entry.file_name());
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    pending.push(path);
                } else if path.extension().is_some_and(|extension| extension == "ko")
                    && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
                {
                    files.insert(plain(name), path);
                }
            }
        }
        Ok(Modules { version, root: tree.to_owned(), files })
    }

    /// Paths (relative to the tree) of the named modules and all that they depend on, in the order to load them.
    /// One that is not there as a file is an error: check the kernel's configuration for whether it is built in.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        for name in names {
            self.visit(&plain(name), &mut order, 0)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<PathBuf>, depth: usize) -> Result<()> {
        let path = self.files.get(name).with_context(|| format!("kernel {} has no module {name}", self.version))?;
        if order.contains(path) {
            return Ok(());
        }
        if depth > 32 {
            bail!("the dependencies of module {name} have no end");
        }
        for needed in self.depends(path)? {
            self.visit(&plain(&needed), order, depth + 1)?;
        }
        order.push(path.clone());
        Ok(())
    }

    /// The `depends=` of the module's `.modinfo` section.
    fn depends(&self, path: &Path) -> Result<Vec<String>> {
        let bytes = fs::read(self.root.join(path)).with_context(|| format!("read {}", path.display()))?;
        let elf = object::File::parse(bytes.as_slice()).with_context(|| format!("{} is no module", path.display()))?;
        let section = elf.section_by_name(".modinfo").with_context(|| format!("{} has no .modinfo", path.display()))?;
        let info = section.data().context("read .modinfo")?;
        Ok(info
            .split(|byte| *byte == 0)
            .filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="))
            .flat_map(|list| list.split(',').filter(|name| !name.is_empty()).map(str::to_owned))
            .collect())
    }

    /// Reads a module's file.
    pub fn read(&self, path: &Path) -> Result<Vec<u8>> {
        fs::read(self.root.join(path)).with_context(|| format!("read {}", path.display()))
    }
}
