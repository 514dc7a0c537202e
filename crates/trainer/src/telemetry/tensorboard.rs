//! TensorBoard event files: protocol buffers in records of length, its checksum, bytes, their checksum.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::TelemetryError;
use super::events::{
    Event, PluginData, SessionLog, Summary, SummaryImage, SummaryMetadata, SummaryValue, TensorDim, TensorProto,
    TensorShape,
};
use super::jsonl::Record;
use crate::run::folder::host_name;

/// How the names of event files begin.
const NAME: &str = "events.out.tfevents.";

/// Writes one event file; every event is on its way to the disk when a call returns.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Begins a file in `folder` with a session start at `step`.
    ///
    /// # Errors
    /// The folder or the file cannot be made.
    pub fn create(folder: &Path, step: u64) -> Result<Self, TelemetryError> {
        fs::create_dir_all(folder).map_err(TelemetryError::at(folder))?;
        let (path, file) = create_new(folder).map_err(TelemetryError::at(folder))?;
        let mut writer = Self { path, file };
        writer.write(Event { file_version: Some("brain.Event:2".into()), ..event(0) })?;
        let session_log = Some(SessionLog { status: SessionLog::START });
        writer.write(Event { session_log, ..event(step) })?;
        Ok(writer)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes every scalar of a record.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars(&mut self, record: &Record) -> Result<(), TelemetryError> {
        let value = record
            .scalars
            .iter()
            .map(|(tag, value)| SummaryValue {
                tag: tag.clone(),
                simple_value: Some(*value as f32),
                ..Default::default()
            })
            .collect();
        self.write(Event { summary: Some(Summary { value }), ..event(record.step) })
    }

    /// Writes a Markdown text.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, markdown: &str) -> Result<(), TelemetryError> {
        let tensor = TensorProto {
            dtype: TensorProto::STRING,
            tensor_shape: Some(TensorShape { dim: vec![TensorDim { size: 1 }] }),
            string_val: vec![markdown.as_bytes().to_vec()],
        };
        let plugin_data = Some(PluginData { plugin_name: "text".into() });
        self.value(
            step,
            SummaryValue {
                tag: tag.into(),
                tensor: Some(tensor),
                metadata: Some(SummaryMetadata { plugin_data }),
                ..Default::default()
            },
        )
    }

    /// Writes an RGB image of these sizes in pixels.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn image(&mut self, step: u64, tag: &str, png: Vec<u8>, width: u32, height: u32) -> Result<(), TelemetryError> {
        const RGB: i32 = 3;
        let image = SummaryImage {
            height: i32::try_from(height).unwrap_or(i32::MAX),
            width: i32::try_from(width).unwrap_or(i32::MAX),
            colorspace: RGB,
            encoded_image_string: png,
        };
        self.value(step, SummaryValue { tag: tag.into(), image: Some(image), ..Default::default() })
    }

    pub(super) fn sync(&mut self) -> Result<(), TelemetryError> {
        self.file.sync_all().map_err(TelemetryError::at(&self.path))
    }

    fn value(&mut self, step: u64, value: SummaryValue) -> Result<(), TelemetryError> {
        self.write(Event { summary: Some(Summary { value: vec![value] }), ..event(step) })
    }

    fn write(&mut self, event: Event) -> Result<(), TelemetryError> {
        self.file.write_all(&frame(&event.encode_to_vec())).map_err(TelemetryError::at(&self.path))
    }
}

/// Cuts the event files of a folder back to what lies before `step`, and what a crash tore off their ends: where a session starts, TensorBoard
/// drops no texts, and its fast loader nothing at all. A file that does not begin with an event stays as it is.
///
/// # Errors
/// A file cannot be read or written.
pub(super) fn cut_back(folder: &Path, step: u64) -> Result<(), TelemetryError> {
    for path in event_files(folder).map_err(TelemetryError::at(folder))? {
        let bytes = fs::read(&path).map_err(TelemetryError::at(&path))?;
        let comes_again =
            |event: &Event| event.summary.is_some() && u64::try_from(event.step).is_ok_and(|at| at >= step);
        let kept = Events { bytes: &bytes, at: 0 }.take_while(|(event, _)| !comes_again(event)).last();
        if let Some((_, end)) = kept.filter(|(_, end)| *end < bytes.len()) {
            let cut = OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(end as u64));
            cut.map_err(TelemetryError::at(&path))?;
        }
    }
    Ok(())
}

/// The events of a file up to its end or to one that is torn, each with the place where it ends.
struct Events<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Iterator for Events<'_> {
    type Item = (Event, usize);

    fn next(&mut self) -> Option<(Event, usize)> {
        let rest = &self.bytes[self.at..];
        let length = u64::from_le_bytes(rest.get(..8)?.try_into().ok()?);
        let data = rest.get(12..)?.get(..usize::try_from(length).ok()?)?;
        let record = frame(data);
        if !rest.starts_with(&record) {
            return None;
        }
        self.at += record.len();
        Some((Event::decode(data).ok()?, self.at))
    }
}

/// The event files of a folder, where it is there.
fn event_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| begun_s(path).is_some() && path.is_file()).collect())
}

/// The second in an event file's name.
fn begun_s(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(NAME)?.split('.').next()?.parse().ok()
}

fn event(step: u64) -> Event {
    Event { wall_time: unix_seconds(), step: i64::try_from(step).unwrap_or(i64::MAX), ..Default::default() }
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// `events.out.tfevents.SECONDS.HOST.PID`. Files are read in the order of their names, so the second is later than that of every file which is there,
/// whatever the clock says.
fn create_new(folder: &Path) -> io::Result<(PathBuf, File)> {
    let newest = event_files(folder)?.iter().filter_map(|path| begun_s(path)).max();
    let seconds = newest.map_or(0, |newest| newest.saturating_add(1)).max(unix_seconds() as u64);
    let path = folder.join(format!("{NAME}{seconds:010}.{}.{}", host_name(), std::process::id()));
    let file = File::create_new(&path)?;
    Ok((path, file))
}

/// A record of TFRecord's format.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(&masked_crc(data).to_le_bytes());
    record
}

/// CRC-32C, rotated and shifted so that a checksum of checksums stays useful.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that TensorFlow's own writer begins every event file with, but for the time (here 1.0).
    #[test]
    fn the_first_record_is_tensorflows() {
        let event = Event { wall_time: 1.0, file_version: Some("brain.Event:2".into()), ..Default::default() };
        let golden = [
            24, 0, 0, 0, 0, 0, 0, 0, 163, 127, 75, 34, 9, 0, 0, 0, 0, 0, 0, 240, 63, 26, 13, b'b', b'r', b'a', b'i',
            b'n', b'.', b'E', b'v', b'e', b'n', b't', b':', b'2',
        ];
        let record = frame(&event.encode_to_vec());
        assert_eq!(record[..golden.len()], golden);
        assert_eq!(record.len(), golden.len() + 4);
    }

    #[test]
    fn a_scalar_by_hand() {
        let value = SummaryValue { tag: "a".into(), simple_value: Some(0.5), ..Default::default() };
        let event =
            Event { wall_time: 1.0, step: 300, summary: Some(Summary { value: vec![value] }), ..Default::default() };
        // 1: double 1.0; 2: varint 300; 5: summary of 10 bytes { 1: value of 8 bytes { 1: "a", 2: float 0.5 } }.
        let golden = [9, 0, 0, 0, 0, 0, 0, 240, 63, 16, 172, 2, 42, 10, 10, 8, 10, 1, b'a', 21, 0, 0, 0, 63];
        assert_eq!(event.encode_to_vec(), golden);
    }

    #[test]
    fn the_mask_is_the_published_one() {
        // CRC-32C of "123456789" is 0xe3069283.
        assert_eq!(masked_crc(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn a_file_s_name_comes_behind_those_that_are_there() {
        let folder = tempfile::tempdir().unwrap();
        // Of a host whose clock is ahead by years.
        fs::write(folder.path().join("events.out.tfevents.9000000000.host.7"), "").unwrap();
        for second in [9_000_000_001, 9_000_000_002] {
            let begun = EventWriter::create(folder.path(), 0).unwrap();
            assert_eq!(begun_s(begun.path()), Some(second));
        }
    }

    /// Steps and tags of a file.
    fn told(path: &Path) -> Vec<(i64, String)> {
        let bytes = fs::read(path).unwrap();
        let values = |(event, _): (Event, usize)| {
            let values = event.summary.map_or(Vec::new(), |summary| summary.value);
            values.into_iter().map(move |value| (event.step, value.tag))
        };
        Events { bytes: &bytes, at: 0 }.flat_map(values).collect()
    }

    #[test]
    fn what_lies_behind_a_step_and_what_was_torn_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), 0).unwrap();
        for step in [10, 20, 30] {
            writer.scalars(&Record::new(step, [("loss", 1.0)])).unwrap();
            writer.text(step, "text", "a red *apple*").unwrap();
        }
        let foreign = folder.path().join("events.out.tfevents.7.foreign");
        fs::write(&foreign, "no events").unwrap();
        let path = writer.path().to_owned();
        let all = [10, 20, 30].map(|step| [(step, "loss".to_owned()), (step, "text".to_owned())]).concat();
        assert_eq!(told(&path), all);
        let whole = fs::read(&path).unwrap();
        for torn in [0, 1, 15] {
            fs::write(&path, [&whole[..], &whole[..torn]].concat()).unwrap();
            cut_back(folder.path(), 31).unwrap();
            assert!(fs::read(&path).unwrap() == whole);
        }
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        cut_back(folder.path(), 31).unwrap();
        assert_eq!(told(&path), all[..5]);
        for (step, kept) in [(21, 4), (20, 2), (0, 0)] {
            cut_back(folder.path(), step).unwrap();
            assert_eq!(told(&path), all[..kept]);
        }
        assert_eq!(fs::read_to_string(foreign).unwrap(), "no events");
        cut_back(&folder.path().join("absent"), 0).unwrap();
    }
}
