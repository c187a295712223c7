/* Load the model of a bundle and check it against its sample: load FOLDER [model.ort]. onnxruntime's C API, nothing else. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sample.h"

static const OrtApi *api;

static void fail(const char *what, const char *why) {
    fprintf(stderr, "FAILED: %s: %s\n", what, why);
    exit(1);
}

static void check(OrtStatus *status, const char *what) {
    if (status != NULL) fail(what, api->GetErrorMessage(status));
}

static void *bytes_of(const char *folder, const Sample *sample) {
    char path[4096];
    if (snprintf(path, sizeof path, "%s/sample/%s", folder, sample->file) >= (int)sizeof path) fail(folder, "path too long");
    FILE *stream = fopen(path, "rb");
    if (stream == NULL) fail(path, "cannot be read");
    void *data = malloc(sample->bytes ? sample->bytes : 1);
    if (data == NULL || fread(data, 1, sample->bytes, stream) != sample->bytes) fail(path, "is too short");
    fclose(stream);
    return data;
}

/* Only float outputs are ever merely close. */
static int close_enough(const Sample *sample, const void *expected, const void *got) {
    if (EXACT || sample->type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return 0;
    const float *a = expected, *b = got;
    size_t count = sample->bytes / sizeof(float);
    double low = INFINITY, high = -INFINITY, off = 0;
    for (size_t i = 0; i < count; i++) {
        low = fmin(low, a[i]);
        high = fmax(high, a[i]);
        if (isnan(b[i])) return 0;
        off = fmax(off, fabs((double)a[i] - b[i]));
    }
    return off <= CLOSE * (high > low ? high - low : 1);
}

int main(int argc, char **argv) {
    const char *folder = argc > 1 ? argv[1] : ".";
    const char *file = argc > 2 ? argv[2] : "model.onnx";
    char path[4096];
    if (snprintf(path, sizeof path, "%s/%s", folder, file) >= (int)sizeof path) fail(folder, "path too long");
    api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == NULL) fail("onnxruntime", "the library is older than its header");

    OrtEnv *env;
    OrtSessionOptions *options;
    OrtSession *session;
    OrtMemoryInfo *memory;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "load", &env), "environment");
    check(api->CreateSessionOptions(&options), "options");
    check(api->SetIntraOpNumThreads(options, 1), "options");
    check(api->CreateSession(env, path, options, &session), path);
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory), "memory");

    OrtValue *given[INPUTS + 1], *made[OUTPUTS + 1] = {NULL};
    const char *given_names[INPUTS + 1], *made_names[OUTPUTS + 1];
    for (int i = 0; i < INPUTS; i++) {
        const Sample *s = &inputs[i];
        void *data = bytes_of(folder, s);
        given_names[i] = s->name;
        check(api->CreateTensorWithDataAsOrtValue(memory, data, s->bytes, s->dims, s->rank, s->type, &given[i]), s->name);
    }
    for (int i = 0; i < OUTPUTS; i++) made_names[i] = outputs[i].name;
    check(api->Run(session, NULL, given_names, (const OrtValue *const *)given, INPUTS, made_names, OUTPUTS, made), "run");

    for (int i = 0; i < OUTPUTS; i++) {
        const Sample *s = &outputs[i];
        OrtTensorTypeAndShapeInfo *info;
        ONNXTensorElementDataType type;
        size_t rank;
        int64_t dims[8];
        void *got;
        check(api->GetTensorTypeAndShape(made[i], &info), s->name);
        check(api->GetTensorElementType(info, &type), s->name);
        check(api->GetDimensionsCount(info, &rank), s->name);
        if (type != s->type || rank != s->rank) fail(s->name, "another type or rank than expected");
        check(api->GetDimensions(info, dims, rank), s->name);
        if (memcmp(dims, s->dims, rank * sizeof *dims) != 0) fail(s->name, "another shape than expected");
        check(api->GetTensorMutableData(made[i], &got), s->name);
        void *expected = bytes_of(folder, s);
        if (memcmp(got, expected, s->bytes) != 0 && !close_enough(s, expected, got)) fail(s->name, "not the expected values");
        free(expected);
        api->ReleaseTensorTypeAndShapeInfo(info);
        api->ReleaseValue(made[i]);
    }
    puts("same: the sample gives the expected outputs");
    for (int i = 0; i < INPUTS; i++) api->ReleaseValue(given[i]);
    api->ReleaseSession(session);
    api->ReleaseSessionOptions(options);
    api->ReleaseMemoryInfo(memory);
    api->ReleaseEnv(env);
    return 0;
}
