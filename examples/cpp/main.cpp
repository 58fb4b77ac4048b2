// Runs an exported detector (TorchScript or an AOTInductor package) on images, without Python code:
//
//     detect MODEL IMAGE ...
//
// and prints a line of JSON for each image, as tools/run_exported.py does.

#include <ATen/core/dispatch/Dispatcher.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <iostream>
#include <optional>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using at::Tensor;

// torchvision registers its operators when its libraries are loaded: those that the models call,
// and those that read images. The names are those of version 0.29 and before.
void load_operators() {
  const std::filesystem::path folder = TORCHVISION;
  const std::vector<std::vector<std::string>> libraries = {
      {"_C_stable.so", "_C.so"}, {"image_stable.so", "image.so"}};
  for (const auto& names : libraries) {
    const auto is_there = [&](const auto& name) { return std::filesystem::exists(folder / name); };
    const auto name = std::find_if(names.begin(), names.end(), is_there);
    if (name == names.end()) throw std::runtime_error("there is no " + (folder / names[0]).string());
    if (!dlopen((folder / *name).c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  }
}

// The JSON that export_model.py stores in the file. Its values are simple enough for expressions;
// texts stay as they are written in JSON.
class Metadata {
 public:
  explicit Metadata(const std::string& path) {
    caffe2::serialize::PyTorchStreamReader reader(path);
    if (!reader.hasRecord("extra/balanced_d2.json")) {
      throw std::runtime_error("it was not written by export_model.py");
    }
    const auto [data, size] = reader.getRecord("extra/balanced_d2.json");
    json_.assign(static_cast<const char*>(data.get()), size);
  }

  int64_t number(const std::string& key) const { return std::stoll(find(key, "([0-9]+)")); }

  std::string text(const std::string& key) const { return find(key, "\"([^\"]*)\""); }

  // Element by element: an expression for the whole list exhausts the stack at a thousand names.
  std::vector<std::string> texts(const std::string& key) const {
    const std::string list = "\"" + key + "\": [";
    const auto start = json_.find(list);
    if (start == std::string::npos) throw missing(key);
    const std::regex element("\"(?:[^\"\\\\]|\\\\.)*\"|\\]");
    std::vector<std::string> found;
    const auto begin = json_.begin() + start + list.size();
    for (std::sregex_iterator i(begin, json_.end(), element), end; i != end && i->str() != "]"; ++i) {
      found.push_back(i->str());
    }
    return found;
  }

 private:
  std::string find(const std::string& key, const std::string& value) const {
    std::smatch match;
    if (!std::regex_search(json_, match, std::regex("\"" + key + "\": *" + value))) {
      throw missing(key);
    }
    return match[1];
  }

  static std::runtime_error missing(const std::string& key) {
    return std::runtime_error("the model file does not say its " + key);
  }

  std::string json_;
};

// The newest that is known; files of the first version have no number, and no format either.
constexpr int64_t FORMAT_VERSION = 2;

struct Detections {
  Tensor boxes, scores, classes;
};

using Detector = std::function<Detections(const Tensor&)>;  // of an image (3, height, width)

Detector load_torchscript(const std::string& path) {
  auto model = torch::jit::load(path);
  model.eval();
  return [model](const Tensor& image) mutable -> Detections {
    const auto outputs = model.forward({image}).toTuple();
    const auto& elements = outputs->elements();
    return {elements[0].toTensor(), elements[2].toTensor(), elements[1].toTensor()};
  };
}

Detector load_aoti(const std::string& path, int64_t multiple) {
  auto model = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
  return [model, multiple](const Tensor& image) -> Detections {
    const auto height = image.size(1), width = image.size(2);
    const auto missing = [&](int64_t length) { return (multiple - length % multiple) % multiple; };
    const auto padded = at::constant_pad_nd(image, {0, missing(width), 0, missing(height)});
    const auto size = at::tensor({height, width}, at::kLong);
    const auto outputs = model->run({padded.unsqueeze(0), size.unsqueeze(0)});
    const auto number = outputs[0].item<int64_t>();
    const auto used = [&](int i) { return outputs[i][0].narrow(0, 0, number); };
    return {used(1), used(2), used(3)};
  };
}

// An image as uint8 (3, height, width), RGB, turned as its EXIF data say; of an animation the first.
Tensor read_image(const std::string& path) {
  constexpr int64_t RGB = 3;
  auto& operators = c10::Dispatcher::singleton();
  const auto call = [&](const char* name, std::vector<c10::IValue> stack) {
    operators.findSchemaOrThrow(name, "").callBoxed(&stack);
    return stack.back().toTensor();
  };
  const Tensor image = call("image::decode_image", {call("image::read_file", {path}), RGB, true});
  if (image.scalar_type() != at::kByte) throw std::runtime_error("it has more than 8 bits a channel");
  return image.dim() == 4 ? image[0] : image;
}

// The network's input, scaled as in training: bilinear with antialiasing, as Pillow does.
Tensor preprocess(const Tensor& image, const Metadata& metadata) {
  double height = image.size(1), width = image.size(2);
  Tensor input = image.unsqueeze(0);
  if (const double min_size = metadata.number("min_size"); min_size > 0) {
    // In Detectron2's two steps: another order of these products can round to another pixel.
    const double max_size = metadata.number("max_size"), scale = min_size / std::min(height, width);
    const bool is_wide = height < width;
    height = is_wide ? min_size : height * scale;
    width = is_wide ? width * scale : min_size;
    if (const double longer = std::max(height, width); longer > max_size) {
      height *= max_size / longer;
      width *= max_size / longer;
    }
    const auto pixels = [](double length) {
      return std::max<int64_t>(1, static_cast<int64_t>(length + 0.5));
    };
    input = at::_upsample_bilinear2d_aa(input, {pixels(height), pixels(width)}, false);
  }
  if (metadata.text("input_format") == "BGR") input = input.flip(1);
  return input[0].to(at::kFloat).contiguous();
}

std::string quoted(const std::string& text) {
  std::string result;
  for (const char c : text) (c == '"' || c == '\\' ? result += '\\' : result) += c;
  return '"' + result + '"';
}

// Detections with boxes in pixels of the image and inside it, without those that are empty there.
Detections in_pixels_of(const Tensor& image, const Tensor& input, const Detections& found) {
  const auto size = [](const Tensor& t) {
    return at::tensor({t.size(2), t.size(1), t.size(2), t.size(1)}, at::kFloat);
  };
  const Tensor zero = at::zeros({}, at::kFloat);
  const Tensor boxes = (found.boxes * (size(image) / size(input))).clamp(zero, size(image));
  const Tensor kept = (boxes.slice(1, 2) > boxes.slice(1, 0, 2)).all(1).nonzero().squeeze(1);
  const auto chosen = [&](const Tensor& t) { return t.index_select(0, kept); };
  return {chosen(boxes), chosen(found.scores), chosen(found.classes)};
}

void print(const std::string& path, const Tensor& image, const Detections& found,
           const std::vector<std::string>& names) {
  std::printf("{\"image\": %s, \"height\": %ld, \"width\": %ld, \"detections\": [",
              quoted(path).c_str(), static_cast<long>(image.size(1)),
              static_cast<long>(image.size(2)));
  const auto box = found.boxes.accessor<float, 2>();
  for (int64_t i = 0; i < found.boxes.size(0); i++) {
    const auto label = found.classes[i].item<int64_t>();
    std::printf("%s{\"bbox\": [%.2f, %.2f, %.2f, %.2f], \"class\": %s, \"class_id\": %ld, "
                "\"score\": %.6f}",
                i ? ", " : "", box[i][0], box[i][1], box[i][2], box[i][3], names.at(label).c_str(),
                static_cast<long>(label), found.scores[i].item<float>());
  }
  std::printf("]}\n");
}

void detect(const std::string& path, const Detector& detector, const Metadata& metadata) {
  const Tensor image = read_image(path);
  const Tensor input = preprocess(image, metadata);
  const Detections found = detector(input);
  print(path, image, in_pixels_of(image, input, found), metadata.texts("class_names"));
}

Detector load(const std::string& path, const Metadata& metadata) {
  const std::string format = metadata.text("format");
  if (metadata.number("format_version") > FORMAT_VERSION) {
    throw std::runtime_error("its format is newer than this program knows");
  }
  if (format == "torchscript") return load_torchscript(path);
  if (format == "aoti") return load_aoti(path, metadata.number("size_divisibility"));
  throw std::runtime_error("a file of the format " + format + " cannot be run from C++");
}

// Whether a function ends without an error, which is printed.
bool succeeds(const char* path, const std::function<void()>& function) {
  try {
    function();
    return true;
  } catch (const c10::Error& error) {
    std::cerr << "error: " << path << ": " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << path << ": " << error.what() << "\n";
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: detect MODEL IMAGE ...\n";
    return 2;
  }
  const c10::InferenceMode no_gradients;
  std::optional<Metadata> metadata;
  Detector detector;
  bool is_good = succeeds(argv[1], [&] {
    load_operators();
    metadata.emplace(argv[1]);
    detector = load(argv[1], *metadata);
  });
  if (!is_good) return 1;
  for (int i = 2; i < argc; i++) {  // one that is bad stops no others
    is_good &= succeeds(argv[i], [&] { detect(argv[i], detector, *metadata); });
  }
  return is_good ? 0 : 1;
}
