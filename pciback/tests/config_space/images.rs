//! The image survives the service, however the service ended.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use pciback::config::{
    Access, ConfigError, Filter, FunctionImage, GUEST_END, ImageError, ImageOwner, InterruptMode, Policy,
    RequestRecord, RequestStage, VectorState, VirtualConfigSpace,
};
use pciback::platform::SharedMemory;
use pciback::{DomId, Sbdf};
use proptest::prelude::*;

use crate::devices;
use crate::model::OWNER;

fn file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(FunctionImage::BYTES as u64).unwrap();
    file
}

fn image(file: &File) -> FunctionImage {
    FunctionImage::new(SharedMemory::map_file(file, FunctionImage::BYTES).unwrap(), OWNER)
}

fn filter() -> Arc<Filter> {
    Arc::new(Filter::compile(&devices::network_pf().spec, &Policy::default()).unwrap())
}

fn created(file: &File) -> VirtualConfigSpace {
    VirtualConfigSpace::create(&devices::network_pf().spec, filter(), image(file)).unwrap()
}

fn resumed(file: &File) -> Result<VirtualConfigSpace, ConfigError> {
    let device = devices::network_pf();
    VirtualConfigSpace::resume(&device.spec, filter(), image(file), &device.hardware)
}

fn request() -> RequestRecord {
    RequestRecord {
        command: 4,
        offset: 1,
        size: 2,
        value: 3,
        info: 5,
        entries_hash: 0x1234_5678_9abc_def0,
        stage: RequestStage::Begun,
    }
}

#[test]
fn a_restarted_service_finds_everything_as_it_was() {
    let (file, device) = (file(), devices::network_pf());
    let mut space = created(&file);
    space.write(Access::new(0x10, 4).unwrap(), u32::MAX, &device.hardware).unwrap();
    space.set_msix_enabled(true);
    let vectors = VectorState {
        mode: InterruptMode::MsiX,
        entries: vec![(0, 55), (9, 56)],
        chosen: vec![9],
        pending: Some(3),
    };
    assert!(space.image_mut().set_vectors(&vectors));
    space.image_mut().begin_request(&request());
    space.image_mut().set_resetting(true);
    space.image_mut().set_conversation(0xfedc_0041);
    drop(space);
    let mut space = resumed(&file).unwrap();
    assert_eq!(space.image().vectors(), vectors);
    assert_eq!(space.image().request(), Some(request()));
    assert!(space.image().resetting());
    assert_eq!(space.image().conversation(), 0xfedc_0041);
    space.image_mut().set_resetting(false);
    let read = |space: &VirtualConfigSpace, offset| {
        space.read(Access::new(offset, 4).unwrap(), &device.hardware).unwrap()
    };
    assert_eq!((read(&space, 0x10), read(&space, 0x70)), (0xfffe_0000, 0x8009_a011));
    space.reset();
    assert_eq!(read(&space, 0x10), 0xfe80_0000);
}

#[test]
fn requests_go_from_begun_to_done_to_forgotten() {
    let file = file();
    let mut space = created(&file);
    let image = space.image_mut();
    assert_eq!(image.request(), None);
    image.finish_request(-5, 7);
    assert_eq!(image.request(), None);
    image.begin_request(&request());
    image.finish_request(-5, 7);
    let stage = RequestStage::Done { error: -5, value: 7 };
    assert_eq!(image.request(), Some(RequestRecord { stage, ..request() }));
    image.clear_request();
    assert_eq!(image.request(), None);
}

#[test]
fn too_many_vectors_change_nothing() {
    let file = file();
    let mut space = created(&file);
    let one = VectorState { mode: InterruptMode::Msi, entries: vec![(0, 1)], ..VectorState::default() };
    assert!(space.image_mut().set_vectors(&one));
    let entries = vec![(0, 0); FunctionImage::MAX_VECTORS + 1];
    assert!(!space.image_mut().set_vectors(&VectorState { entries, ..one.clone() }));
    assert_eq!(space.image().vectors(), one);
    let entries = vec![(7, 8); FunctionImage::MAX_VECTORS];
    let most = VectorState { entries, ..one };
    assert!(space.image_mut().set_vectors(&most));
    assert_eq!(space.image().vectors(), most);
}

#[test]
fn a_writer_killed_at_any_word_leaves_the_old_vectors_or_the_new() {
    let (before, after) = (file(), file());
    let old = VectorState {
        mode: InterruptMode::MsiX,
        entries: vec![(0, 10), (1, 11)],
        chosen: vec![1],
        pending: Some(2),
    };
    let new = VectorState { entries: vec![(5, 50)], ..VectorState::default() };
    for (file, last) in [(&before, &old), (&after, &new)] {
        let mut space = created(file);
        assert!(space.image_mut().set_vectors(&VectorState::default()));
        assert!(space.image_mut().set_vectors(&old));
        assert!(space.image_mut().set_vectors(last));
    }
    // Both were switched three times, `before` to what it had: going back one generation makes it the file in which the new
    // vectors are being written.
    let [before, after] =
        [before, after].map(|file| SharedMemory::map_file(&file, FunctionImage::BYTES).unwrap());
    let slots = 3 * 1024..5 * 1024;
    let generation = 9;
    assert_eq!(before[generation].load(Relaxed), after[generation].load(Relaxed));
    let switched = after[generation].load(Relaxed);
    before[generation].store(switched - 1, Relaxed);
    let seen = |memory: &SharedMemory| {
        let copy = file();
        let mapped = SharedMemory::map_file(&copy, FunctionImage::BYTES).unwrap();
        for (to, from) in mapped.iter().zip(memory.iter()) {
            to.store(from.load(Relaxed), Relaxed);
        }
        resumed(&copy).unwrap().image().vectors()
    };
    for index in slots {
        let written = after[index].load(Relaxed);
        if before[index].swap(written, Relaxed) != written {
            assert_eq!(seen(&before), old, "after word {index}");
        }
    }
    before[generation].store(switched, Relaxed);
    assert_eq!(seen(&before), new);
}

#[test]
fn an_image_of_something_else_is_refused() {
    let file = file();
    assert!(matches!(resumed(&file), Err(ConfigError::Image(ImageError::Magic { found: 0, .. }))));
    created(&file);
    assert!(resumed(&file).is_ok());
    let spec = devices::network_pf().spec;
    let with = |owner, spec: &pciback::config::FunctionSpec| {
        let memory = SharedMemory::map_file(&file, FunctionImage::BYTES).unwrap();
        let image = FunctionImage::new(memory, owner);
        match VirtualConfigSpace::resume(spec, filter(), image, &devices::network_pf().hardware) {
            Err(ConfigError::Image(ImageError::Mismatch { what, .. })) => what,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(with(ImageOwner { boot: 1, ..OWNER }, &spec), "boot");
    assert_eq!(with(ImageOwner { domain: DomId(4), ..OWNER }, &spec), "domain");
    let mut other = spec.clone();
    other.address = Sbdf::from_devfn(0, 2, 0);
    assert_eq!(with(OWNER, &other), "function");
    let memory = SharedMemory::map_file(&file, FunctionImage::BYTES).unwrap();
    memory[1].store(99, Relaxed);
    assert!(matches!(resumed(&file), Err(ConfigError::Image(ImageError::Version { found: 99, .. }))));
    let short = FunctionImage::new(SharedMemory::anonymous(4096).unwrap(), OWNER);
    let refused = VirtualConfigSpace::create(&spec, filter(), short);
    assert!(matches!(refused, Err(ConfigError::Image(ImageError::Size { bytes: 4096, .. }))));
}

#[test]
fn an_image_with_a_bar_at_an_address_that_no_guest_has_is_refused() {
    let file = file();
    created(&file).image_mut().set_placed(3, Some(GUEST_END - 0x1000));
    assert!(resumed(&file).is_ok());
    for address in [GUEST_END, !0xfff] {
        let memory = SharedMemory::map_file(&file, FunctionImage::BYTES).unwrap();
        FunctionImage::new(memory, OWNER).set_placed(3, Some(address));
        assert!(
            matches!(resumed(&file), Err(ConfigError::Image(ImageError::Damaged { .. }))),
            "{address:#x}"
        );
    }
}

#[test]
fn a_filter_of_another_layout_is_refused() {
    let other = devices::disk().spec;
    assert!(matches!(
        VirtualConfigSpace::create(&other, filter(), image(&file())),
        Err(ConfigError::LayoutMismatch { .. })
    ));
    let file = file();
    created(&file);
    let shape = SharedMemory::map_file(&file, FunctionImage::BYTES).unwrap();
    shape[6].fetch_add(1, Relaxed);
    assert!(matches!(resumed(&file), Err(ConfigError::Image(ImageError::Mismatch { what: "layout", .. }))));
}

proptest! {
    #[test]
    fn a_damaged_image_is_refused_or_harmless(
        damage in prop::collection::vec((0usize..FunctionImage::BYTES / 4, any::<u32>()), 1..40),
        accesses in prop::collection::vec((0u32..0x1000, any::<u32>()), 1..20),
    ) {
        let (file, device) = (file(), devices::network_pf());
        created(&file);
        let memory = SharedMemory::map_file(&file, FunctionImage::BYTES).unwrap();
        for (index, value) in damage {
            memory[index].store(value, Relaxed);
        }
        if let Ok(mut space) = resumed(&file) {
            // Constants are corrected: identity and the low bits of BARs cannot be forged.
            space.image_mut().set_resetting(false);
            let read = |space: &VirtualConfigSpace, offset| {
                space.read(Access::new(offset, 4).unwrap(), &device.hardware).unwrap()
            };
            prop_assert_eq!(read(&space, 0x40) & 0xffff, 0x5001);
            prop_assert_eq!(read(&space, 0x34), 0x40);
            space.image().vectors();
            for (place, value) in accesses {
                let access = Access::new(place & !3, 4).unwrap();
                space.write(access, value, &device.hardware).unwrap();
                space.read(access, &device.hardware).unwrap();
            }
            space.image_mut().finish_request(0, 0);
            let space_vectors = space.image().vectors();
            prop_assert!(space.image_mut().set_vectors(&space_vectors));
            space.reset();
        }
    }
}
