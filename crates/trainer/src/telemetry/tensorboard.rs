//! TensorBoard event files: protocol buffers in records of length, its checksum, bytes, their checksum.

use std::fs::{self, File};
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

fn event(step: u64) -> Event {
    Event { wall_time: unix_seconds(), step: i64::try_from(step).unwrap_or(i64::MAX), ..Default::default() }
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// `events.out.tfevents.SECONDS.HOST.PID`, with a number behind it where one process begins two files in a second.
fn create_new(folder: &Path) -> io::Result<(PathBuf, File)> {
    let name = format!("events.out.tfevents.{:010}.{}.{}", unix_seconds() as u64, host_name(), std::process::id());
    for number in 0u32.. {
        let path = folder.join(if number == 0 { name.clone() } else { format!("{name}.{number}") });
        match File::create_new(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
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
    fn two_files_begun_in_one_second_have_two_names() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventWriter::create(folder.path(), 0).unwrap();
        let second = EventWriter::create(folder.path(), 0).unwrap();
        assert_ne!(first.path(), second.path());
    }
}
