use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

/// A folder with the weights that a configuration names, and configuration files.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["vit", "bert", "llm"] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("config.json"), "{}").unwrap();
        }
        fs::write(folder.path().join("a.tar"), "").unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A smallest stage-1 file with `more` lines behind it; `DIR` stands for the folder.
    fn file(&self, name: &str, more: &str) -> PathBuf {
        self.raw(
            name,
            &format!(
                "task: {{stage: 1}}\nmodel: {{vision: {{weights: DIR/vit}}, qformer: {{init: DIR/bert}}}}\n\
                 data: {{train: [{{shards: DIR/a.tar}}]}}\n{more}"
            ),
        )
    }

    fn raw(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text.replace("DIR", &self.folder.path().display().to_string())).unwrap();
        path
    }

    fn load(&self, more: &str, sets: &[&str]) -> Result<Config, ConfigErrors> {
        let sets: Vec<String> =
            sets.iter().map(|set| set.replace("DIR", &self.folder.path().display().to_string())).collect();
        Config::load(&self.file("c.yaml", more), &sets)
    }

    /// The mistakes, with the folder's name taken out.
    fn mistakes(&self, path: &Path, sets: &[&str]) -> Vec<String> {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        let errors = Config::load(path, &sets).unwrap_err();
        let prefix = format!("{}/", self.folder.path().display());
        errors.to_string().lines().map(|line| line.replace(&prefix, "")).collect()
    }
}

#[test]
fn a_smallest_file_has_every_default() {
    let config = Fixture::new().load("", &[]).unwrap();
    assert_eq!(config.run.name, "stage1");
    assert_eq!(config.run.precision, Precision::Bf16);
    assert_eq!(config.optimizer.lr, 1e-4);
    assert_eq!(config.optimizer.betas, [0.9, 0.98]);
    assert_eq!((config.schedule.steps, config.schedule.global_batch, config.micro_batch()), (250_000, 1680, 1680));
    assert_eq!(config.model.vision.layer, AutoOr::Auto);
    assert_eq!(config.data.feature_cache, FeatureCache::Off);
    assert_eq!((config.data.shard_cache.dir, config.data.shard_cache.max_gib), (AutoOr::Auto, 64.0));
    assert_eq!(config.data.shard_cache.give_up_s, 300.0);
    assert_eq!(config.data.train[0].weight, 1.0);
    assert_eq!((config.model.language, config.data.val, config.checkpoint.best), (None, None, None));
    let (question, answers) = ("question".to_string(), "answers".to_string());
    assert_eq!(config.eval.vqa, VqaConfig { question, answers, prompt: AutoOr::Auto });
}

#[test]
fn a_question_has_fields_and_a_place_in_its_prompt() {
    let fixture = Fixture::new();
    let vqa = fixture.load("eval: {vqa: {question: q.text, prompt: 'Q: {} A:'}}", &[]).unwrap().eval.vqa;
    assert_eq!((vqa.question.as_str(), vqa.answers.as_str()), ("q.text", "answers"));
    assert_eq!(vqa.prompt, AutoOr::Given("Q: {} A:".into()));
    let path = fixture.file("vqa.yaml", "eval: {vqa: {question: ' ', answer: a, prompt: why}}");
    let expected = [
        "vqa.yaml: eval.vqa.answer: expected a known key, got an unknown one; did you mean answers?",
        "vqa.yaml: eval.vqa.question: expected a field of the .json member; dots lead into objects, got \" \"",
        "vqa.yaml: eval.vqa.prompt: expected auto or a text with {} in it, got \"why\"",
    ];
    assert_eq!(fixture.mistakes(&path, &[]), expected);
}

#[test]
fn the_image_size_is_a_number_or_the_tower_s_own() {
    let size = |set: &str| Fixture::new().load("", &[set]).map(|config| config.data.image.size);
    assert_eq!(Fixture::new().load("", &[]).unwrap().data.image.size, AutoOr::Given(224));
    assert_eq!(size("data.image.size=384").unwrap(), AutoOr::Given(384));
    assert_eq!(size("data.image.size=auto").unwrap(), AutoOr::Auto);
    let message = size("data.image.size=0").unwrap_err().to_string();
    assert!(message.contains("data.image.size: expected auto or a whole number from 1 to 8192, got 0"), "{message}");
}

#[test]
fn exponents_without_a_point_are_numbers() {
    let config = Fixture::new().load("optimizer: {lr: 3e-4}\nschedule: {steps: 5e3}\n", &[]).unwrap();
    assert_eq!((config.optimizer.lr, config.schedule.steps), (3e-4, 5000));
}

#[test]
fn every_mistake_is_listed_at_once() {
    let fixture = Fixture::new();
    let path = fixture.raw(
        "bad.yaml",
        "run: {precision: fp8, sed: 1, name: 2024}\ntask: {stage: 3, label_smoothing: 1.0}\nlr: 1\n\
         model: {vision: {weights: DIR/none}, qformer: {init: DIR/a.tar, dropout: yes}}\n\
         optimizer: {lr: fast, betas: [0.9], warmup_steps: 10, eps: .nan}\n\
         schedule: {steps: 5, global_batch: 10, micro_batch: 4}\ndata: {lanes: 3}\nlog: {every: 0, every: 2}\n",
    );
    let expected = [
        "bad.yaml: lr: expected a known key, got an unknown one; did you mean optimizer.lr?",
        "bad.yaml: run.sed: expected a known key, got an unknown one; did you mean seed?",
        "bad.yaml: run.name: expected a text, got 2024; write \"2024\", with the quotes",
        "bad.yaml: run.precision: expected fp32 | bf16 | fp16, got \"fp8\"",
        "bad.yaml: task.stage: expected 1 | 2, got 3",
        "bad.yaml: task.label_smoothing: expected a number from 0 to below 1, got 1.0",
        "bad.yaml: model.qformer.dropout: expected a number, got \"yes\"",
        "bad.yaml: data.train: expected a list, got nothing; this key has no default",
        "bad.yaml: optimizer.lr: expected a number, got \"fast\"",
        "bad.yaml: optimizer.betas: expected a list of two numbers, got [0.9]",
        "bad.yaml: optimizer.eps: expected a number, got NaN",
        "bad.yaml: log.every: expected the key once, got it 2 times; delete all but one",
        "bad.yaml: schedule.micro_batch: expected a divisor of schedule.global_batch (10), got 4",
        "bad.yaml: data.lanes: expected a divisor of schedule.global_batch (10), got 3",
        "bad.yaml: optimizer.warmup_steps: expected at most schedule.steps (5), got 10",
        "bad.yaml: model.vision.weights: expected a folder with config.json, got none, which does not exist; \
         relative paths start at the current directory",
        "bad.yaml: model.qformer.init: expected a folder with config.json or checkpoints or MANIFEST.json, got a.tar, \
         which is a file; give the folder that it lies in",
    ];
    assert_eq!(fixture.mistakes(&path, &[]), expected);
}

#[test]
fn contradictions_are_mistakes() {
    let fixture = Fixture::new();
    for (more, sets, expected) in [
        ("", vec!["model.language.weights=llm"], "model.language: expected no such section in stage 1"),
        ("", vec!["task.stage=2"], "model.language: expected a section with weights in stage 2, got nothing"),
        ("run: {device: cpu, precision: fp16}", vec![], "run.precision: expected fp32 | bf16 on run.device: cpu"),
        ("", vec!["data.feature_cache=memory"], "data.feature_cache: expected off | a folder"),
        (
            "",
            vec!["data.feature_cache=c", "data.feature_views=2", "data.image.augment=none"],
            "data.feature_views: expected 1 with data.image.augment: none, got 2",
        ),
        (
            "",
            vec!["data.feature_cache=memory", "data.image.augment=none", "data.image.jpegs=reduced"],
            "data.image.jpegs: expected full with data.feature_cache: memory, got reduced",
        ),
        ("", vec!["data.feature_views=2"], "data.feature_views: expected no such key with data.feature_cache: \"off\""),
        ("", vec!["data.feature_format=int8"], "data.feature_format: expected no such key with data.feature_cache"),
        ("", vec!["data.feature_max_gib=2"], "data.feature_max_gib: expected no such key with data.feature_cache"),
        (
            "",
            vec!["data.feature_cache=c", "data.feature_max_gib=0"],
            "data.feature_max_gib: expected null or a number above 0",
        ),
        (
            "",
            vec!["data.feature_cache=c", "data.feature_views=0"],
            "data.feature_views: expected a whole number of at least 1",
        ),
        ("", vec!["optimizer.min_lr=1"], "optimizer.min_lr: expected at most optimizer.lr (0.0001), got 1.0"),
        ("schedule: {global_batch: 1}", vec![], "schedule.global_batch: expected at least 2 in stage 1, got 1"),
        ("task: {stage: 1}", vec![], "task: expected the key once, got it 2 times"),
        ("", vec!["task.losses={itc: 0, itm: 0, itg: 0}"], "task.losses: expected at least one weight above 0"),
        ("checkpoint: {best: val_loss}", vec![], "checkpoint.best: expected null without data.val"),
        ("", vec!["data.train=[]"], "data.train: expected a list of at least one set, got []"),
        (
            "",
            vec!["data.train.0.shards=no/{0..1}.tar"],
            "data.train.0.shards: expected a pattern of shards that exist, got ",
        ),
        ("", vec!["data.val.shards=no/*.tar"], "data.val.shards: expected a pattern of shards that exist, got "),
        ("run: {name: ../up}", vec![], "run.name: expected a name without"),
    ] {
        let mistakes = fixture.mistakes(&fixture.file("c.yaml", more), &sets);
        assert!(mistakes.iter().any(|line| line.contains(expected)), "{expected:?} not in {mistakes:#?}");
    }
}

#[test]
fn set_reaches_sections_lists_and_texts() {
    let fixture = Fixture::new();
    let sets = ["optimizer.lr=2e-4", "data.train.0.weight=3", "run.name=b=c", "schedule.micro_batch=null"];
    let config = fixture.load("optimizer:\n  # nothing here\n", &sets).unwrap();
    assert_eq!((config.optimizer.lr, config.data.train[0].weight), (2e-4, 3.0));
    assert_eq!((config.run.name.as_str(), config.schedule.micro_batch), ("b=c", None));
}

#[test]
fn a_wrong_set_is_named_instead_of_the_file() {
    let fixture = Fixture::new();
    let path = fixture.file("c.yaml", "run: {seed: 1}\n");
    let sets = ["optimzer.lr=1", "run.seed=-1", "data.train.1.weight=2", "no_value", "log.every=[", "run.seed.x=1"];
    let expected = [
        "--set data.train.1.weight=2: data.train.1: expected the index of one of 1 entries, from 0, got \"1\"; or set the list as a whole",
        "--set no_value: expected key.path=value, got \"no_value\"; there is no = in it",
        "--set log.every=[: log.every: expected a YAML value, got ",
        "--set optimzer.lr=1: optimzer: expected a known key, got an unknown one; did you mean optimizer?",
        "--set run.seed.x=1: run.seed: expected a whole number of at least 0, got {x: 1}",
    ];
    let mistakes = fixture.mistakes(&path, &sets);
    assert_eq!(mistakes.len(), expected.len(), "{mistakes:#?}");
    for (line, expected) in mistakes.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line}");
    }
    assert_eq!(
        fixture.mistakes(&path, &["run.seed=-1"]),
        ["--set run.seed=-1: run.seed: expected a whole number of at least 0, got -1"]
    );
}

#[test]
fn no_mistake_shows_credentials() {
    let fixture = Fixture::new();
    let sets = [
        "data.train.0.shards=[https://user:secret@host/0.tar]",
        "data.val=https://user:secret@host/0.tar?signature=secret",
        "data.vall.shards=\"htps://user:secret@host/0.tar\"",
        "https://user:secret@host/0.tar",
    ];
    for set in sets {
        let mistakes = fixture.mistakes(&fixture.file("c.yaml", ""), &[set]);
        assert!(mistakes.iter().any(|line| line.contains("://...@host/0.tar")), "{mistakes:?}");
        assert!(!mistakes.iter().any(|line| line.contains("secret")), "{mistakes:?}");
    }
    let file = fixture.file("d.yaml", "eval: {every: 'https://user:secret@host'}\n");
    assert!(fixture.mistakes(&file, &[])[0].contains(", got \"https://...@host\""));
}

#[test]
fn what_is_not_a_configuration_is_one_clear_line() {
    let fixture = Fixture::new();
    assert!(
        fixture.mistakes(&fixture.path("none.yaml"), &[])[0]
            .starts_with("none.yaml: expected a readable YAML file, got ")
    );
    assert!(
        fixture.mistakes(&fixture.raw("syntax.yaml", "run: {name: [}"), &[])[0]
            .starts_with("syntax.yaml: expected YAML, got ")
    );
    assert!(fixture.mistakes(&fixture.raw("text.yaml", "hello"), &[])[0].contains("expected a mapping"));
    assert!(fixture.mistakes(&fixture.raw("tag.yaml", "run: !x {name: a}"), &[])[0].contains("YAML"));
    fs::write(fixture.path("bytes.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    assert!(fixture.mistakes(&fixture.path("bytes.yaml"), &[])[0].contains("UTF-8"));
    let laughs = "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                  d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n";
    assert!(!fixture.mistakes(&fixture.raw("laughs.yaml", laughs), &[]).is_empty());
    let deep = "[".repeat(100_000);
    assert!(fixture.mistakes(&fixture.raw("deep.yaml", &deep), &[])[0].contains("expected YAML"));
    assert!(fixture.mistakes(&fixture.raw("empty.yaml", ""), &[]).iter().any(|line| line.contains("task.stage")));
}

#[test]
fn a_later_file_may_start_from_the_run_of_an_earlier_one() {
    let fixture = Fixture::new();
    let first = fixture.file("one.yaml", "run: {dir: ./DIR/runs}\n");
    let second = "run: {dir: DIR/runs}\ntask: {stage: 2}\ndata: {train: [{shards: DIR/a.tar}]}\n\
                  model: {vision: {weights: DIR/vit}, qformer: {init: DIR/runs/stage1}, language: {weights: DIR/llm}}\n";
    let second = fixture.raw("two.yaml", second);
    let first = fixture.raw("one.yaml", &fs::read_to_string(&first).unwrap().replace("./", ""));
    assert!(Config::load(&second, &[]).is_err());
    let configs = Config::load_all(&[first.clone(), second.clone()], &[]).unwrap();
    assert_eq!((configs[0].run.name.as_str(), configs[1].run.name.as_str()), ("stage1", "stage2"));
    assert!(configs[1].begins_from(&std::path::absolute(configs[0].run_folder()).unwrap()));

    let fewer = fs::read_to_string(&second).unwrap().replace("qformer: {", "qformer: {query_tokens: 8, ");
    let fewer = fixture.raw("fewer.yaml", &fewer);
    let told = Config::load_all(&[first.clone(), fewer], &[]).unwrap_err().to_string();
    assert!(told.contains("model.qformer.query_tokens: expected 32, as the stage before trains in"), "{told}");

    let twice = Config::load_all(&[first.clone(), first], &[]).unwrap_err().to_string();
    assert!(twice.contains("run.name: expected a run of its own for each file, got stage1"), "{twice}");
}

#[test]
fn differences_say_what_a_continued_run_may_change() {
    let fixture = Fixture::new();
    let run = fixture.load("", &[]).unwrap();
    assert_eq!(run.differences(&run), []);
    let sets = [
        "log.every=1",
        "data.loader.threads=2",
        "data.shard_cache.max_gib=0.5",
        "schedule.steps=300000",
        "run.device=cpu",
        "eval.captions=1",
        "data.train.0.shards=DIR/../*/a.tar",
        "optimizer.lr=2e-4",
    ];
    let here = fixture.load("", &sets).unwrap();
    let of = |change| {
        let kept = here.differences(&run).into_iter().filter(move |difference| difference.change == change);
        kept.map(|difference| difference.key).collect::<Vec<_>>()
    };
    assert_eq!(of(Change::Refused), ["optimizer.lr"]);
    assert_eq!(of(Change::ShardsMoved), ["data.train.0.shards"]);
    let allowed = [
        "run.device",
        "data.shard_cache.max_gib",
        "data.loader.threads",
        "schedule.steps",
        "log.every",
        "eval.captions",
    ];
    assert_eq!(of(Change::Allowed), allowed);
    assert_eq!(here.differences(&run)[4].to_string(), "optimizer.lr: 0.0001 in the run, 0.0002 here");

    let longer = fixture.load("", &["schedule.steps=300000"]).unwrap();
    assert_eq!(longer.digest(), run.digest());
    assert_ne!(here.digest(), run.digest());

    let more = fixture.load("", &["data.train=[{shards: DIR/a.tar}, {shards: DIR/a.tar}]"]).unwrap();
    assert!(more.differences(&run).iter().any(|d| d.key == "data.train.1.weight" && d.change == Change::Refused));
    assert!(run.differences(&more).iter().any(|d| d.key == "data.train.1.weight" && d.here == "-"));
}

#[test]
fn keys_lists_leaves_at_every_depth() {
    let keys = Config::keys();
    for key in ["run.name", "task.losses.itm", "model.language.before_queries", "data.train.0.weight", "eval.captions"]
    {
        assert!(keys.iter().any(|known| known == key), "{key}");
    }
}

#[test]
fn the_reference_has_every_key_with_range_default_and_words() {
    let text = Config::reference();
    for line in [
        "## `task.losses`",
        "| `stage` | 1 \\| 2 | must be given | The pre-training stage. |",
        "| `label_smoothing` | a number from 0 to below 1 | `0.1` | Label smoothing of ITC and ITG. |",
        "| `betas` | two numbers from 0 to below 1 | `[0.9, 0.98]` | Decay rates of the two moments. |",
        "| `tokenizer` | null or a path | `null` | Folder of stage 1's tokenizer files; left out: that of `init`. |",
        "| `gelu` | config \\| exact | `config` | Which GELU a T5 1.1 or FlanT5 computes. `config`: The one that its `config.json` names. \
         `exact`: GELU by its definition, as in LAVIS. |",
        "| `model` | a section | must be given | The three parts of the model. |",
        "| `log` | a section |  | How often metrics are logged. |",
        "The same keys stand in `data.val.captions`.",
        "A run that goes on may change `log`, `eval`, `checkpoint`, `data.loader`, `data.shard_cache`, `run.device`, `run.name`, \
         `run.dir`, `schedule.steps`, but not `data.loader.window_shards`; and `shards`, where the same ones lie there.",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\nin\n{text}");
    }
    for key in Config::keys() {
        let name = key.rsplit('.').next().unwrap();
        assert!(text.contains(&format!("\n| `{name}` | ")), "{key}");
    }
    assert_eq!(text.matches("\n| `min` | ").count(), 1, "a section that stands in several places is listed once");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_written_configuration_loads_to_an_equal_one(
        lr in 1e-12f64..1e3, seed: u64, steps in 2000u64..1 << 40, layer in proptest::option::of(-40i64..40),
        prompt in "\\PC{0,20}", ids in proptest::option::of(proptest::collection::vec(any::<u64>(), 0..3)),
        cache in 0usize..3, beta in 0.0f64..1.0, device in 0usize..4,
    ) {
        let fixture = Fixture::new();
        let mut config = fixture.load("", &[]).unwrap();
        config.task.stage = Stage::Two;
        config.optimizer.lr = lr;
        config.optimizer.min_lr = lr / 3.0;
        config.optimizer.warmup_start_lr = 0.0;
        config.optimizer.betas[1] = beta;
        config.run.seed = seed;
        config.run.device = [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(None), DeviceChoice::Cuda(Some(3))][device];
        config.schedule.steps = steps;
        config.model.vision.layer = layer.map_or(AutoOr::Auto, AutoOr::Given);
        config.data.image.augment = Augment::None;
        config.data.feature_cache = [FeatureCache::Off, FeatureCache::Memory, FeatureCache::Directory("cache dir".into())][cache].clone();
        config.model.language = Some(LanguageConfig {
            weights: fixture.path("llm").into(), dtype: Precision::Fp32, dropout: LanguageDropout::Parity, gelu: Gelu::Exact, prompt, prefix: Prefix::Split,
            before_queries: ids.map_or(AutoOr::Auto, |ids| AutoOr::Given(TokenIds(ids))),
        });
        let path = fixture.path("written.yaml");
        fs::write(&path, config.to_yaml()).unwrap();
        prop_assert_eq!(Config::load(&path, &[]).unwrap(), config);
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "[ -~\n]{0,200}") {
        let fixture = Fixture::new();
        let _ = Config::load(&fixture.raw("any.yaml", &text), &[]);
    }
}

#[test]
fn a_data_set_says_where_its_captions_are_and_which_samples_count() {
    let fixture = Fixture::new();
    let load = |set: &str| {
        let path = fixture.raw(
            "sets.yaml",
            &format!(
                "task: {{stage: 1}}\nmodel: {{vision: {{weights: DIR/vit}}, qformer: {{init: DIR/bert}}}}\n\
                 data: {{train: [{{shards: DIR/a.tar, {set}}}, {{shards: DIR/a.tar, weight: 0.5, name: b}}]}}\n"
            ),
        );
        (path.clone(), Config::load(&path, &[]))
    };
    let (_, config) = load(
        "name: a, captions: {field: blip.texts, top: 2}, template: 'a photo of {}', \
         filter: {width: {min: 200}, json: {similarity: {min: 0.3}, 'p.safe': {max: 1}}}",
    );
    let config = config.unwrap();
    let set = &config.data.train[0];
    assert_eq!(set.captions, Some(CaptionsConfig { field: "blip.texts".into(), top: Some(2) }));
    assert_eq!(set.filter.width, BoundsConfig { min: Some(200.0), max: None });
    assert_eq!(set.filter.json.0[1], ("p.safe".to_string(), BoundsConfig { min: None, max: Some(1.0) }));
    assert_eq!(config.data.train[1].text, TextField::Auto);
    // What is written into the run's folder is read back as it was.
    let written = fixture.raw("written.yaml", &config.to_yaml());
    assert_eq!(Config::load(&written, &[]).unwrap(), config);

    let mistakes = |set: &str| fixture.mistakes(&load(set).0, &[]);
    for (set, expected) in [
        ("text: caption", "sets.yaml: data.train.0.text: expected auto | txt | json.FIELD, got \"caption\""),
        ("template: photo", "sets.yaml: data.train.0.template: expected a text with {} in it, got \"photo\""),
        ("name: b", "sets.yaml: data.train: expected a name for each set, got b twice"),
        (
            "text: txt, captions: {field: texts}",
            "sets.yaml: data.train.0.captions: expected null with data.train.0.text, got a list of captions; give one of the two",
        ),
        (
            "filter: {height: {min: 9, max: 2}}",
            "sets.yaml: data.train.0.filter.height: expected min at most max (2.0), got 9.0; no sample passes",
        ),
        (
            "filter: {json: {similarity: {mn: 1}}}",
            "sets.yaml: data.train.0.filter.json.similarity.mn: expected a known key, got an unknown one; did you mean min?",
        ),
    ] {
        assert_eq!(mistakes(set), [expected]);
    }
    let weights = mistakes("weight: 0.1234567891");
    assert!(weights[0].contains("write them with fewer digits"), "{weights:?}");
}
