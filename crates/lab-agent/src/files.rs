//! Files into and out of dom0.

use crate::agent::{Input, Output};
use anyhow::{Context, Result, bail};
use lab_agent::frame::{Frame, Kind};
use lab_agent::message::Done;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::mpsc;

const CHUNK: usize = 256 << 10;

/// Writes what arrives to a file beside `path` and renames it when it is complete.
pub fn put(path: &str, mode: u32, input: &mpsc::Receiver<Input>) -> Result<Done> {
    let target = Path::new(path);
    let (Some(parent), Some(name), true) = (target.parent(), target.file_name(), target.is_absolute()) else {
        bail!("{path} is not an absolute path of a file");
    };
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    let partial = parent.join(format!(".{}.partial", name.to_string_lossy()));
    let result = receive(&partial, mode, input).and_then(|()| {
        fs::rename(&partial, target).with_context(|| format!("rename to {path}"))?;
        Ok(Done::Ok)
    });
    if result.is_err() {
        let _ = fs::remove_file(&partial);
    }
    result
}

fn receive(partial: &Path, mode: u32, input: &mpsc::Receiver<Input>) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(partial)
        .with_context(|| format!("make {}", partial.display()))?;
    loop {
        match input.recv() {
            Ok(Input::Data(bytes)) => file.write_all(&bytes).with_context(|| format!("write {}", partial.display()))?,
            Ok(Input::End) => break,
            Ok(Input::Resize(..)) => {}
            Ok(Input::Kill) | Err(_) => bail!("given up before the file was complete"),
        }
    }
    // The umask applied when it was made.
    file.set_permissions(fs::Permissions::from_mode(mode)).context("set the permissions")
}

/// Sends a file's bytes.
pub fn get(path: &str, stream: u32, output: &Output) -> Result<Done> {
    let mut file = fs::File::open(path).with_context(|| format!("open {path}"))?;
    let mut chunk = vec![0u8; CHUNK];
    loop {
        let n = file.read(&mut chunk).with_context(|| format!("read {path}"))?;
        if n == 0 {
            return Ok(Done::Ok);
        }
        output.send(&Frame { stream, kind: Kind::Data, body: chunk.get(..n).unwrap_or_default().to_vec() });
    }
}
