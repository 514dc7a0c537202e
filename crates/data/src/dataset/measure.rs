//! What filters ask of the samples of a shard, read from it.

use std::io;

use crate::SampleError;
use crate::dataset::attributes::{Column, Measured};
use crate::image::{ImageFormat, inspect};
use crate::loader::sample::guarded;
use crate::shards::index::{IndexedSample, Member};
use crate::shards::shard::OpenShard;
use crate::text::caption::{self, CaptionRule, Pick};

/// Where nearly every image file has its width and height.
const IMAGE_HEAD_BYTES: u64 = 1 << 16;

impl OpenShard {
    /// What filters ask of every sample of the shard; what the shard's bytes do not say has no value.
    ///
    /// # Errors
    /// When the bytes cannot be read: that says nothing of the samples, and is not kept.
    pub(crate) fn measure(&self, columns: &[Column], rule: &CaptionRule) -> io::Result<Vec<Measured>> {
        let wants = |wanted: fn(&Column) -> bool| columns.iter().any(wanted);
        let sides = wants(|column| matches!(column, Column::Width | Column::Height));
        let words = wants(|column| matches!(column, Column::CaptionWords));
        let json = wants(|column| matches!(column, Column::Json(_)));
        let rule = CaptionRule { template: None, ..rule.clone() };
        let words_of = |sample: &IndexedSample| {
            let caption = rule.caption(&self.captions(sample, &rule)?.members(), Pick::First, &|_| true)?;
            Ok(caption.split_whitespace().count())
        };
        let parsed = |member: &Member| caption::parse(&self.read(member)?);
        let measure = |sample: &IndexedSample| {
            let metadata = sample.metadata().filter(|_| json);
            Ok(Measured {
                sides: sides.then(|| said(guarded(|| self.sides(&sample.image)))).transpose()?.flatten(),
                caption_words: words.then(|| said(words_of(sample))).transpose()?.flatten(),
                json: metadata.map(|member| said(parsed(member))).transpose()?.flatten(),
            })
        };
        // Not side by side: whoever reads from the shard waits behind a lock, perhaps a thread of the same pool.
        self.index.samples.iter().map(measure).collect()
    }

    /// Width and height.
    fn sides(&self, image: &Member) -> Result<(usize, usize), SampleError> {
        self.inspect(image).map(|(_, width, height)| (width, height))
    }

    /// Format, width and height, mostly from the file's first bytes.
    pub(crate) fn inspect(&self, image: &Member) -> Result<(ImageFormat, usize, usize), SampleError> {
        let head = self.read(&Member { bytes: image.bytes.min(IMAGE_HEAD_BYTES), ..*image })?;
        Ok(match inspect(&head) {
            Err(_) if image.bytes > IMAGE_HEAD_BYTES => inspect(&self.read(image)?)?,
            inspected => inspected?,
        })
    }
}

/// A value, where the sample has one.
fn said<T>(value: Result<T, SampleError>) -> io::Result<Option<T>> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(SampleError::Io(error)) => Err(error),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use super::*;
    use crate::fixture::{png, tar, write};
    use crate::scan;
    use crate::text::caption::JsonPath;

    /// A read that fails once must not exclude a sample for ever.
    #[test]
    fn what_cannot_be_read_is_an_error_and_what_is_not_there_has_no_value() {
        let folder = tempfile::tempdir().unwrap();
        let image = png(5, 4, 1);
        let members: [(&str, &[u8]); 5] = [
            ("a.png", &image),
            ("a.txt", b"two words"),
            ("a.json", b"{\"score\": 1}"),
            ("b.png", b"no image"),
            ("b.json", b"no json"),
        ];
        let path = write(folder.path(), "0.tar", &tar(&members));
        let index = scan(&path).unwrap();
        let score = Column::Json(JsonPath::new("score"));
        let columns = [Column::Width, Column::CaptionWords, score.clone()];
        let shard = OpenShard { file: File::open(&path).unwrap(), index: index.clone() };
        let measured = shard.measure(&columns, &CaptionRule::default()).unwrap();
        assert_eq!((measured[0].sides, measured[0].caption_words), (Some((5, 4)), Some(2)));
        assert!(measured[0].json.is_some());
        assert_eq!((measured[1].sides, measured[1].caption_words), (None, None));
        assert!(measured[1].json.is_none());

        let shard = OpenShard { file: OpenOptions::new().append(true).open(&path).unwrap(), index };
        for column in [Column::Height, Column::CaptionWords, score] {
            assert!(shard.measure(&[column], &CaptionRule::default()).is_err());
        }
    }
}
