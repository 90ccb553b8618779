#!/usr/bin/env bash
# What a container of the pipeline image runs: a daemon of compose.yaml, a Spark executor that a driver has started on
# Kubernetes, or any command.
# usage: entrypoint namenode | datanode | spark-master | spark-worker | executor | COMMAND [ARGS...]
set -euo pipefail

hdfs() {
  exec java -Xmx512m -cp "$HADOOP_CONF_DIR:/opt/hadoop/*:$SPARK_HOME/jars/*" "org.apache.hadoop.hdfs.server.$1" "${@:2}"
}

# Spark's driver gives an executor its options as SPARK_JAVA_OPT_0, _1 ... and its place as the variables below.
executor() {
  local name options=()
  for name in $(compgen -v SPARK_JAVA_OPT_ | sort -t_ -k4n); do options+=("${!name}"); done
  exec java "${options[@]}" "-Xms$SPARK_EXECUTOR_MEMORY" "-Xmx$SPARK_EXECUTOR_MEMORY" \
    -cp "${SPARK_CLASSPATH:+$SPARK_CLASSPATH:}$SPARK_CONF_DIR:$HADOOP_CONF_DIR:$SPARK_HOME/jars/*:$PWD" \
    org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \
    --driver-url "$SPARK_DRIVER_URL" --executor-id "$SPARK_EXECUTOR_ID" --cores "$SPARK_EXECUTOR_CORES" \
    --app-id "$SPARK_APPLICATION_ID" --hostname "$SPARK_EXECUTOR_POD_IP" \
    --resourceProfileId "$SPARK_RESOURCE_PROFILE_ID" --podName "$SPARK_EXECUTOR_POD_NAME"
}

case ${1:-} in
  namenode)
    [[ -d /data/name/current ]] || (hdfs namenode.NameNode -format -nonInteractive)
    hdfs namenode.NameNode
    ;;
  datanode) hdfs datanode.DataNode ;;
  spark-master) exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.master.Master --host "$(hostname)" --port 7077 ;;
  spark-worker) exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.worker.Worker --work-dir /tmp/spark spark://spark-master:7077 ;;
  executor) executor ;;
  --help) sed -n '2,/^set /{/^# /s/^# //p}' "$0" ;;
  "")
    grep -m1 '^# usage: ' "$0" | cut -c3- >&2
    exit 2
    ;;
  *) exec "$@" ;;
esac
