// Asks for ranked lists from Java, by the KServe v2 protocol alone:
//
//   java Recommend --top-k 5 --option exclude_seen=false --option 'caps={"brand": 2}' 127.0.0.1:8001 u1 u2
//
// Prints a line for each item: user, release, degraded, item, score, task=probability …, with tabs between.
import com.google.protobuf.ByteString;
import inference.GRPCInferenceServiceGrpc;
import inference.Inference.InferParameter;
import inference.Inference.InferTensorContents;
import inference.Inference.ModelInferRequest;
import inference.Inference.ModelInferResponse;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.StatusRuntimeException;
import java.io.PrintStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

public class Recommend {
    /** Holds one user's list: K items, and T probabilities of each. */
    record Answer(String release, long degraded, List<String> itemIds, float[] scores, List<String> tasks,
                  float[] probabilities) {}

    /** Asks about users. No deadline and no cancelling: below Triton 2.59 either can end the server; the option
     * budget_ms bounds a call. */
    static List<Answer> recommend(ManagedChannel channel, List<String> users, Map<String, InferParameter> options) {
        InferTensorContents.Builder ids = InferTensorContents.newBuilder();
        for (String user : users) ids.addBytesContents(ByteString.copyFromUtf8(user));
        ModelInferRequest request = ModelInferRequest.newBuilder()
            .setModelName("recommend")
            .putAllParameters(options)
            .addInputs(ModelInferRequest.InferInputTensor.newBuilder()
                .setName("user_id").setDatatype("BYTES").addShape(users.size()).addShape(1).setContents(ids))
            .build();
        return answers(GRPCInferenceServiceGrpc.newBlockingStub(channel).modelInfer(request), users.size());
    }

    /** Cuts the answer's tensors, each a matrix with a line for each user. */
    static List<Answer> answers(ModelInferResponse response, int users) {
        Map<String, ByteBuffer> raw = new HashMap<>();
        for (int at = 0; at < response.getOutputsCount(); at++) {
            ByteBuffer bytes = response.getRawOutputContents(at).asReadOnlyByteBuffer();
            raw.put(response.getOutputs(at).getName(), bytes.order(ByteOrder.LITTLE_ENDIAN));
        }
        List<String> ids = texts(raw.get("item_ids"));
        List<String> releases = texts(raw.get("release"));
        List<String> tasks = texts(raw.get("tasks"));
        List<Answer> found = new ArrayList<>();
        for (int user = 0; user < users; user++) {
            int wide = ids.size() / users;
            found.add(new Answer(releases.get(user), raw.get("degraded").getLong(8 * user),
                ids.subList(user * wide, (user + 1) * wide), floats(raw.get("scores"), user, users),
                names(tasks.get(user)), floats(raw.get("probabilities"), user, users)));
        }
        return found;
    }

    static float[] floats(ByteBuffer raw, int user, int users) {
        float[] found = new float[raw.limit() / 4 / users];
        for (int at = 0; at < found.length; at++) found[at] = raw.getFloat(4 * (user * found.length + at));
        return found;
    }

    /** Reads texts, each behind its length in 4 bytes. */
    static List<String> texts(ByteBuffer raw) {
        List<String> found = new ArrayList<>();
        while (raw.hasRemaining()) {
            byte[] text = new byte[raw.getInt()];
            raw.get(text);
            found.add(new String(text, StandardCharsets.UTF_8));
        }
        return found;
    }

    /** Reads a JSON list of names; those of tasks hold neither quotes nor signs. */
    static List<String> names(String json) {
        List<String> found = new ArrayList<>();
        Matcher name = Pattern.compile("\"([^\"]*)\"").matcher(json);
        while (name.find()) found.add(name.group(1));
        return found;
    }

    /** Writes an option as a request parameter: numbers and truth values as such, all else as text or JSON. */
    static InferParameter parameter(String text) {
        InferParameter.Builder parameter = InferParameter.newBuilder();
        if (text.matches("-?\\d+")) return parameter.setInt64Param(Long.parseLong(text)).build();
        if (text.equals("true") || text.equals("false")) {
            return parameter.setBoolParam(text.equals("true")).build();
        }
        return parameter.setStringParam(text).build();
    }

    public static void main(String[] arguments) {
        Map<String, InferParameter> options = new HashMap<>();
        List<String> rest = new ArrayList<>();
        for (int at = 0; at < arguments.length; at++) {
            if (arguments[at].equals("--top-k")) options.put("top_k", parameter(arguments[++at]));
            else if (arguments[at].equals("--option")) {
                String[] pair = arguments[++at].split("=", 2);
                options.put(pair[0], parameter(pair[1]));
            } else rest.add(arguments[at]);
        }
        List<String> users = rest.subList(1, rest.size());
        ManagedChannel channel = ManagedChannelBuilder.forTarget(rest.get(0)).usePlaintext().build();
        PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        try {
            List<Answer> lists = recommend(channel, users, options);
            for (int user = 0; user < lists.size(); user++) print(out, users.get(user), lists.get(user));
        } catch (StatusRuntimeException error) {
            System.err.println("error: " + error.getStatus().getDescription());
            System.exit(1);
        } finally {
            channel.shutdown();
        }
    }

    static void print(PrintStream out, String user, Answer list) {
        for (int place = 0; place < list.itemIds().size(); place++) {
            if (list.itemIds().get(place).isEmpty()) continue; // a list may be shorter than top_k
            StringBuilder line = new StringBuilder(String.join("\t", user, list.release(),
                Long.toString(list.degraded()), list.itemIds().get(place), Float.toString(list.scores()[place])));
            for (int task = 0; task < list.tasks().size(); task++) {
                line.append('\t').append(list.tasks().get(task)).append('=')
                    .append(list.probabilities()[place * list.tasks().size() + task]);
            }
            out.println(line);
        }
    }
}
