//! The paper's recipes in `configs/paper`: each is read without a mistake, trains as many parameters as LAVIS' logs and the paper's
//! table 2 say, and has the recipe of section 3.4.

use std::fs;
use std::path::{Path, PathBuf};

use blip2_model::{Blip2Config, Stage1, Stage2};
use blip2_torchx::params::ParamStore;
use blip2_trainer::config::{AutoOr, Config, Precision, Prefix, Stage};
use serde_json::json;
use tch::Kind;

fn configs() -> Vec<(String, Config)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/paper");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path: &PathBuf| {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        (name, Config::load_resolved(path).unwrap_or_else(|errors| panic!("{}: {errors}", path.display())))
    };
    files.iter().map(read).collect()
}

/// Parameters that a stage trains behind features of one width and before a language model of another.
fn trained(stage: Stage, vision_width: i64, language_width: i64) -> u64 {
    let json = json!({
        "architectures": ["Blip2ForImageTextRetrieval"],
        "num_query_tokens": 32,
        "vision_config": {"hidden_size": vision_width, "num_attention_heads": 16},
        "qformer_config": {"vocab_size": 30_523, "encoder_hidden_size": vision_width},
    });
    let config = Blip2Config::from_json(&json).unwrap();
    let params = ParamStore::declared(Kind::Float);
    match stage {
        Stage::One => drop(Stage1::new(&params.root(), &config)),
        Stage::Two => drop(Stage2::new(&params.root(), &config, language_width, Vec::new())),
    }
    params.num_elements()
}

#[test]
fn each_recipe_trains_the_paper_s_count_of_parameters() {
    let counts = [
        ("stage1_vit_g", 1408, 0, 186_705_470),
        ("stage1_vit_l", 1024, 0, 183_165_758),
        ("stage2_vit_g_flan_t5_xl", 1408, 2048, 106_739_968),
        ("stage2_vit_g_flan_t5_xxl", 1408, 4096, 108_314_880),
        ("stage2_vit_g_opt_2_7b", 1408, 2560, 107_133_696),
        ("stage2_vit_g_opt_6_7b", 1408, 4096, 108_314_880),
        ("stage2_vit_l_flan_t5_xl", 1024, 2048, 103_200_256),
        ("stage2_vit_l_flan_t5_xxl", 1024, 4096, 104_775_168),
        ("stage2_vit_l_opt_2_7b", 1024, 2560, 103_593_984),
        ("stage2_vit_l_opt_6_7b", 1024, 4096, 104_775_168),
    ];
    let configs = configs();
    assert_eq!(configs.iter().map(|c| c.0.as_str()).collect::<Vec<_>>(), counts.map(|c| c.0));
    for ((name, config), (_, vision, language, count)) in configs.iter().zip(counts) {
        let clip = config.model.vision.weights.display().to_string().contains("clip-vit-large");
        assert_eq!(if clip { 1024 } else { 1408 }, vision, "{name}");
        assert_eq!(config.model.qformer.query_tokens, 32, "{name}");
        assert_eq!(trained(config.task.stage, vision, language), count, "{name}");
    }
}

#[test]
fn each_recipe_is_that_of_section_3_4() {
    for (name, config) in configs() {
        let (schedule, optimizer) = (&config.schedule, &config.optimizer);
        assert_eq!(config.run.name, name);
        assert_eq!((optimizer.lr, optimizer.betas, optimizer.weight_decay), (1e-4, [0.9, 0.98], 0.05), "{name}");
        assert_eq!((optimizer.warmup_steps, config.data.image.size), (2000, AutoOr::Given(224)), "{name}");
        let t5 = name.contains("t5");
        let (steps, batch, min_lr) = match config.task.stage {
            Stage::One => (250_000, if name.ends_with("vit_l") { 2320 } else { 1680 }, 1e-5),
            Stage::Two => (80_000, if t5 { 1520 } else { 1920 }, 5e-5),
        };
        assert_eq!((schedule.steps, schedule.global_batch, optimizer.min_lr), (steps, batch, min_lr), "{name}");
        assert_eq!(config.run.precision, if t5 { Precision::Bf16 } else { Precision::Fp16 }, "{name}");
        let Some(language) = &config.model.language else { continue };
        assert_eq!(language.prefix, if t5 { Prefix::Split } else { Prefix::None }, "{name}");
        let stage1 = format!("runs/stage1_{}", if name.contains("vit_g") { "vit_g" } else { "vit_l" });
        assert_eq!(config.model.qformer.init.display().to_string(), stage1, "{name}");
    }
}
